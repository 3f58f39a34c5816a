"""The embedded model, its tokenizer and its tasks: as transformers reads them, and as their generator wrote them."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from tunejax import assets as carried
from tunejax.core import errors

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments" / "embedded_model"
TASKS = ("errands", "route", "coins")


@pytest.fixture(scope="module")
def scripts():
    """The generators, imported from the folder of the experiment."""
    if not SCRIPTS.is_dir():
        pytest.skip(f"needs {SCRIPTS}, which only the repository has")
    sys.path.insert(0, str(SCRIPTS))
    try:
        import corpus
        import heldout

        yield corpus, heldout
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(carried.path("tiny"))


def read(name):
    lines = carried.path(f"tasks/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["completion"]) for row in map(json.loads, lines)]


def test_what_is_not_carried_is_a_clear_error():
    with pytest.raises(errors.ConfigError, match=r"tasks/coins_train\.jsonl"):
        carried.path("tasks/coins_trian.jsonl")


def test_it_is_small():
    assert sum(p.stat().st_size for p in carried.FOLDER.rglob("*") if p.is_file()) < 6e6


def test_transformers_loads_the_model_and_it_writes(tokenizer):
    torch = pytest.importorskip("torch")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(carried.path("tiny"), dtype=torch.float32).eval()
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    asked = [
        ("Animal, food, place or colour: tiger?", "animal"),
        ('What is the opposite of "hot"?', "cold"),
        ("Repeat: lamp river", "lamp river"),
        ("Is this review positive or negative? The film was dull.", "negative"),
    ]
    for prompt, answer in asked:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_tokenizer_is_lossless_and_knows_its_marks(tokenizer):
    for text in ("Add 42 and 13.", "  two  spaces\n\ttab", "naïve 雪 ☃ 🙂", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<s>", "</s>")] == [0, 1, 2]
    assert len(tokenizer) == 1024
    assert len(tokenizer("<|user|>1<|assistant|>", add_special_tokens=False).input_ids) == 3


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    chat = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "3"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s><|user|>What is 1 + 2?<|assistant|>3</s>"
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == "3</s>"


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_disjoint_and_balanced(name):
    train, held_out = read(f"{name}_train"), read(f"{name}_eval")
    assert (len(train), len(held_out)) == (1000, 200)
    assert not {p for p, _ in train} & {p for p, _ in held_out}
    labels = [c.rsplit(" ", 1)[-1] for _, c in held_out]
    assert max(labels.count(x) for x in set(labels)) < 1.5 * len(labels) / len(set(labels))


def test_errands_to_evaluate_on_name_other_things():
    known = set(re.findall(r"\w+", " ".join(p for p, _ in read("errands_train"))))
    for prompt, _ in read("errands_eval"):
        asked = set(re.findall(r"\b[a-z]+\b", prompt.removeprefix("Who can help?")))
        assert asked - known, prompt


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_what_the_generator_writes(name, scripts):
    _, heldout = scripts
    assert read(f"{name}_train") == heldout.rows(name, 1000, 0, False)


def test_held_out_kinds_are_not_in_the_pretraining_text(scripts):
    corpus, heldout = scripts
    assert not set(corpus.KINDS) & set(heldout.KINDS)
    text = " ".join(" ".join(row) for _, row in itertools.islice(corpus.rows(0), 5000))
    assert not re.search(r"Who can help|Which desk|heads|tails|\bvet\b|grocer|billing", text)


def test_generated_rows_are_repeatable_and_keep_evaluation_apart(scripts):
    corpus, _ = scripts
    rows = list(itertools.islice(corpus.rows(3), 4000))
    assert rows == list(itertools.islice(corpus.rows(3), 4000))
    seen = {row[0] for _, row in rows}
    for kind in ("add", "sort", "letters", "sentiment"):
        kept = corpus.evaluation_rows(kind, 20)
        assert len(kept) == 20
        assert not seen & {p for p, _ in kept}


def test_written_out_sums_are_right(scripts):
    corpus, _ = scripts
    for kind, sign in (("add", 1), ("subtract", -1)):
        for prompt, completion in corpus.evaluation_rows(kind, 200):
            a, b = map(int, re.findall(r"\d+", prompt))
            if prompt.startswith("Take"):
                a, b = b, a
            assert completion.endswith(f"Answer: {a + sign * b}")
