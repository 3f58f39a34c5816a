"""What a config may say. Keys take the names that users of Hugging Face know where one exists.

Every section refuses unknown keys. What only another part can judge (a method's arguments, a file's contents)
is checked by that part, with an error of its own.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tunejax.config import locate
from tunejax.data import virtual
from tunejax.data.options import LABELLED, check_gap

MOST_SEEDS = 2**32
"""JAX's keys hold so many: a greater seed would be one of the smaller ones again."""
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of the config: unknown keys are refused, defaults are checked, and text that says a number is one."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class ModelSection(Section):
    """Which pretrained model, and how it is held."""

    path: str = Field("embedded", description="folder, hub id, 'embedded', or 'package:NAME/folder'", min_length=1)
    tokenizer: str | None = Field(None, description="another folder or id for the tokenizer")
    head: Literal["lm", "mlm", "classification"] | None = Field(None, description="by default what the objective asks")
    num_labels: int | None = Field(None, ge=2, description="of a classification head; by default read off the data")
    dtype: Dtype = Field("float32", description="of the computation; trained values stay float32")
    param_dtype: Dtype = Field("float32", description="of the frozen base")
    remat: str = Field("projections", description="what the backward pass keeps: none (all), dots, projections, full")
    dropout: float | None = Field(None, ge=0, lt=1, description="instead of the checkpoint's own")
    layers: list[int] | None = Field(
        None, min_length=1, description="only these layers of the checkpoint, ascending: a shallower student"
    )
    random_init: bool = Field(False, description="the checkpoint's shape and tokenizer, with fresh random weights")

    @field_validator("layers")
    @classmethod
    def _ascending(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (value != sorted(set(value)) or value[0] < 0):
            raise ValueError(f"the layers to keep count from 0 and ascend, such as [0, 2, 4]; found {value}")
        return value


class Source(Section):
    """One of several files or hub ids that are mixed."""

    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0, description="how often its rows are drawn, relative to the other sources")


class DataSection(Section):
    """The rows, and how they become batches."""

    path: list[Source] = Field(description="file, hub id, or a list of them (or of {path, weight}) to mix")
    eval_path: str | None = None
    split: str = Field("train", description="of a hub id")
    eval_split: str = "validation"
    format: Literal["text", "prompt_completion", "messages", "classification"] | None = Field(
        None, description="by default told from the keys of the first row"
    )
    columns: dict[str, str] = Field({}, description="the name expected -> the name in the file")
    labels: list[str] | None = Field(
        None, description="names of the classes, in order; by default as the checkpoint's own head has them, or else "
        "the data set, else those of the rows, sorted",
    )  # fmt: skip
    template: str | None = Field(None, description="text around '{prompt}' or '{text}'; '{virtual:3}': virtual tokens")
    max_length: int = Field(512, ge=2)
    packing: bool | Literal["bfd", "first_fit", "wrapped"] = Field(False, description="several examples a row")
    group_by_length: bool = Field(False, description="batches of examples of similar length")
    pad_to_multiple_of: int | None = Field(
        None, ge=1, description="without packing: lengths that batches are padded to, each a program to compile; "
        "max_length is the last, and the only one from there on. By default 32, 64, 128, ...",
    )  # fmt: skip
    assistant_only_loss: bool = Field(True, description="for messages: only assistant turns bear loss")
    completion_only_loss: bool = Field(True, description="for prompt_completion: only the completion bears loss")
    append_eos: bool = Field(True, description="end every example with the end-of-sequence token, in the loss")
    on_bad_row: Literal["error", "skip"] = "error"
    truncation: Literal["error", "skip", "end", "split"] = Field(
        "error", description="what a row longer than max_length is: bad, left out, cut, or (text) several examples"
    )
    separator: str | None = Field(None, description="line between the documents of a text file")
    eos_token_id: int | None = Field(None, ge=0, description="instead of the tokenizer's")
    shuffle: bool = True
    max_rows: int | None = Field(None, ge=1, description="only the first rows of `path`")
    max_eval_rows: int | None = Field(None, ge=1)

    @field_validator("path", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if not value:
            raise ValueError("name at least one file or hub id")
        sources = value if isinstance(value, list) else [value]
        return [s if isinstance(s, dict) else {"path": s} for s in sources]


class ObjectiveSection(BaseModel):
    """What training minimises; further keys are options of that objective."""

    model_config = ConfigDict(extra="allow")
    name: Literal["causal_lm", "masked_lm", "classification", "cloze"] = "causal_lm"


class HiddenSection(Section):
    """Hidden states beside the teacher's; see `objectives.features.hidden`."""

    weight: float = Field(1.0, gt=0)
    layers: Literal["uniform", "last"] | list[tuple[int, int]] = Field(
        "uniform", description="pairs of a student's and a teacher's layer, from 0 (-1: the last); or a rule"
    )
    metric: Literal["mse", "cosine", "normalized_mse"] = "mse"
    embeddings: bool = Field(False, description="what enters the first layer too")
    project: bool | None = Field(
        None, description="a trained kernel to the teacher's width; by default where it differs"
    )


class RelationsSection(Section):
    """Relations among tokens beside the teacher's; see `objectives.features.relations`."""

    weight: float = Field(1.0, gt=0)
    of: list[Literal["query", "key", "value", "attention"]] = Field(["query", "key", "value"], min_length=1)
    heads: int | None = Field(None, ge=1, description="relation heads; by default the models' own, as many in both")
    student_layer: int = Field(-1, description="from 0; a negative one counts from the end")
    teacher_layer: int = -1


class OnPolicySection(Section):
    """The student writes, the teacher judges; see `train.on_policy`."""

    fraction: float = Field(1.0, gt=0, le=1, description="of the steps; the others learn from the rows' completions")
    temperature: float = Field(1.0, ge=0, description="that the student draws at; 0: greedy")
    max_new_tokens: int | None = Field(None, ge=1, description="by default generation.max_new_tokens")


class DistillSection(Section):
    """A teacher, whose distribution the objective is mixed with; see `objectives.distill`."""

    teacher: str | None = Field(
        None, min_length=1, description="run folder, model folder or hub id; a config file, whose run is made first; "
        "'base': the model itself, without what trains. Not opened by training where there is a cache",
    )  # fmt: skip
    cache: str | None = Field(None, min_length=1, description="folder that `tunejax distill-cache` wrote, instead")
    top_k: int = Field(64, ge=1, description="how many tokens a position `tunejax distill-cache` keeps")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the objective; the teacher has the rest")
    temperature: float = Field(2.0, gt=0)
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "decoupled", "uld"] = (
        "forward_kl"
    )
    beta: float = Field(0.5, description="of jensen_shannon, and of the second part of decoupled")
    target_weight: float = Field(1.0, description="of the first part of decoupled")
    logits: float = Field(1.0, ge=0, description="a factor on the divergence; 0: features alone teach")
    hidden: HiddenSection | None = None
    relations: RelationsSection | None = None
    on_policy: OnPolicySection | None = None

    @model_validator(mode="after")
    def _some_source(self) -> "DistillSection":
        if self.teacher is None and self.cache is None:
            raise ValueError("name a teacher (or a cache that tunejax distill-cache wrote)")
        features = [name for name in ("hidden", "relations") if getattr(self, name) is not None]
        if self.cache and features:
            raise ValueError(f"a cache holds logits, and {features[0]} needs the teacher itself: leave one of them out")
        if not features and not self.alpha and not self.logits:
            raise ValueError("alpha and logits are 0, and neither hidden nor relations are given: nothing is learned")
        if self.cache and self.divergence == "uld":
            raise ValueError("divergence uld sorts whole distributions, and a cache has their likeliest tokens only")
        if self.on_policy is not None and self.alpha:
            raise ValueError(f"alpha is {self.alpha}; what the student writes is no truth to learn: on_policy needs 0")
        if self.on_policy is not None and self.cache:
            raise ValueError("a cache knows the rows alone, and on_policy asks the teacher about new text")
        return self


class TrainSection(Section):
    """The optimisation, and what is written while it runs."""

    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(None, ge=1, description="overrides num_train_epochs")
    num_train_epochs: float | None = Field(None, gt=0, description="3 unless max_steps is given")
    train_batch_size: int | None = Field(
        None, ge=1, description="rows of one optimiser step, over all devices and accumulation; 8 unless told"
    )
    per_device_train_batch_size: int | None = Field(
        None, ge=1, description="instead: times the devices of the data axes, times gradient_accumulation_steps"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches that a step is cut into")
    eval_batch_size: int | None = Field(None, ge=1, description="by default that of a micro-batch")
    optim: str = "adamw"
    lr_scheduler_type: str = "linear"
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where the schedule ends, relative to learning_rate")
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="of all steps; not together with warmup_steps")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float | None = Field(None, ge=0, lt=1, description="by default the optimiser's own (adamw: 0.9)")
    adam_beta2: float | None = Field(None, ge=0, lt=1, description="by default the optimiser's own (adamw: 0.999)")
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="global norm that gradients are cut to; null: never")
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    save_steps: int | None = Field(None, ge=1, description="by default a tenth of all steps")
    save_total_limit: int = Field(2, ge=1)
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = Field(None, description="by default false for a loss or nll, else true")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without a better one")
    load_best_model_at_end: bool | None = Field(None, description="by default where early_stopping_patience is given")
    max_nonfinite_steps: int = Field(5, ge=1, description="stop after so many skipped updates in a row")
    report_to: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    progress: bool = True

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if value in ("none", None):
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("max_steps", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return None if value == -1 else value

    @model_validator(mode="after")
    def _agree(self) -> "TrainSection":
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.train_batch_size and self.per_device_train_batch_size:
            raise ValueError("give train_batch_size or per_device_train_batch_size, not both")
        if (self.train_batch_size or 0) % self.gradient_accumulation_steps:
            raise ValueError(
                f"train_batch_size ({self.train_batch_size}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps})"
            )
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience counts evaluations: set eval_steps too")
        return self


class MeshSection(Section):
    """How many devices each axis of the mesh has; -1 for one of them takes the rest."""

    data: int = Field(-1, ge=-1)
    fsdp: int = Field(1, ge=-1)
    tensor: int = Field(1, ge=-1)

    @model_validator(mode="after")
    def _one_rest(self) -> "MeshSection":
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(f"data, fsdp, tensor are {sizes}: each is at least 1, and at most one of them -1")
        return self


class GenerationSection(Section):
    """How text is sampled: for samples, for exact match, and by `tunejax generate`."""

    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, gt=0, le=1)
    prompts: list[str] = Field([], description="sampled at the end; by default the first prompts of eval_path")
    num_samples: int = Field(5, ge=0)


class EvaluationSection(Section):
    """What is measured before and after training on data.eval_path, besides the loss."""

    exact_match: bool | None = Field(None, description="generate and compare; by default for prompt_completion rows")
    max_rows: int = Field(200, ge=1, description="rows that exact match generates for")


class Config(Section):
    """A whole run."""

    output_dir: str = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=MOST_SEEDS)
    model: ModelSection = ModelSection()  # type: ignore[call-arg]
    data: DataSection
    method: dict[str, Any] | list[dict[str, Any]] = Field(description="one method, or a list to chain")
    objective: ObjectiveSection = ObjectiveSection()
    distill: DistillSection | None = None
    many: list[dict[str, Any]] = Field(
        [], description="several runs in one program: of each, seed, train.learning_rate, method.rank that differ"
    )
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    mesh: MeshSection = MeshSection()  # type: ignore[call-arg]
    generation: GenerationSection = GenerationSection()  # type: ignore[call-arg]
    evaluation: EvaluationSection = EvaluationSection()  # type: ignore[call-arg]
    expected: dict[str, tuple[float, float]] = Field({}, description="key of summary.json -> the range it must lie in")

    @field_validator("output_dir")
    @classmethod
    def _located(cls, value: str) -> str:
        return locate.expanded(value)

    @field_validator("method", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        specs = value if isinstance(value, list) else [value]
        specs = [{"name": s} if isinstance(s, str) else s for s in specs]
        for spec in specs:
            if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
                raise ValueError(f"a method is a mapping with a name, such as {{name: lora, rank: 8}}; found {spec!r}")
        if not specs:
            raise ValueError("name at least one method")
        from tunejax.methods import registry  # reads jax, which the rest of a config can do without

        specs = registry.spelled_out(specs)
        return specs if isinstance(value, list) or len(specs) > 1 else specs[0]

    @model_validator(mode="after")
    def _cloze_fits(self) -> "Config":
        """The verbalizer's labels are the classes, in its order."""
        if self.objective.name != "cloze":
            return self
        check_gap(self.data.template)
        words = (self.objective.model_extra or {}).get("verbalizer")
        if not isinstance(words, dict) or len(words) < 2 or not all(isinstance(w, str) for w in words.values()):
            raise ValueError(
                f"objective.verbalizer is {words!r}; expected a word for each label: {{neg: bad, pos: good}}"
            )
        labels = [str(label) for label in words]
        if self.data.labels not in (None, labels):
            raise ValueError(
                f"data.labels are {self.data.labels}, and objective.verbalizer has {labels}: leave them out"
            )
        if self.distill:
            raise ValueError("distill does not go with objective.name: cloze")
        self.data.labels = labels
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> "Config":
        heads = {"causal_lm": "lm", "masked_lm": "mlm", "classification": "classification", "cloze": "mlm"}
        needs = heads[self.objective.name]
        if self.model.head not in (None, needs):
            raise ValueError(f"objective {self.objective.name} needs model.head: {needs}, found {self.model.head}")
        self.model.head = needs  # type: ignore[assignment]
        if self.objective.name in LABELLED and self.data.packing:
            raise ValueError(f"data.packing does not go with objective.name: {self.objective.name} (one example a row)")
        if self.distill and self.distill.on_policy and (self.objective.name != "causal_lm" or self.data.packing):
            raise ValueError("distill.on_policy goes with objective.name: causal_lm and no data.packing")
        if self.distill and self.distill.divergence == "uld" and self.objective.name != "causal_lm":
            raise ValueError("distill.divergence: uld goes with objective.name: causal_lm")
        if self.distill and self.distill.cache and self.objective.name == "masked_lm":
            raise ValueError(
                "distill.cache does not go with objective.name: masked_lm, which hides other tokens each step: "
                "name distill.teacher alone"
            )
        if self.distill and virtual.count(self.data.template):
            d = self.distill
            refused = {"cache": d.cache, "on_policy": d.on_policy, "divergence: uld": d.divergence == "uld"}
            if names := [f"distill.{name}" for name, value in refused.items() if value]:
                raise ValueError(f"{names[0]} does not go with virtual tokens in data.template")
        if self.train.eval_steps and not self.data.eval_path:
            raise ValueError("train.eval_steps needs rows to evaluate on: set data.eval_path")
        if self.train.load_best_model_at_end and not self.data.eval_path:
            raise ValueError("train.load_best_model_at_end needs evaluations: set data.eval_path")
        return self
