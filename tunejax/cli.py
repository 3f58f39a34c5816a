"""The command line: one command, a verb each. Heavy imports wait inside the verbs, so ``--help`` is instant."""

import argparse
import os
import sys
from collections.abc import Sequence

from tunejax.core import errors

INTERRUPTED = 130
EPILOG = """
Config keys and their defaults: tunejax train --keys
Any key of the config can be overridden: tunejax train CONFIG train.learning_rate=1e-4 model.path=FOLDER
"""


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `ConfigError`s, with the nearest choice."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise errors.ConfigError(f"{message}\n{self.format_usage().strip()}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.metavar or action.dest
            choices = [str(c) for c in action.choices]
            raise errors.ConfigError(f"unknown {what} {value!r}. {errors.did_you_mean(str(value), choices)}")


def _seed(text: str) -> int:
    """The type of ``--seed``."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; expected a whole number in [0, 2^32)")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    top = _Parser(prog="tunejax", description="Tune a pretrained language model.", epilog=EPILOG, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    top.add_argument("--version", action="store_true", help="print the version")
    verbs = top.add_subparsers(dest="verb", metavar="verb", parser_class=_Parser)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, allow_abbrev=False)

    def config(name: str, text: str) -> argparse.ArgumentParser:
        sub = verb(name, text)
        sub.add_argument("config", nargs="?", help="YAML file")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
        return sub

    config("train", "tune a model; the same command again resumes").add_argument(
        "--keys", action="store_true", help="list every config key with its default"
    )
    config("distill-cache", "write what a config's teacher says of its rows, to train without the teacher; resumes")
    written = config("distill-generate", "write a config's rows with its teacher's answers, to train on; resumes")
    written.add_argument("--output", required=True, help="JSON Lines file to write")
    written.add_argument("--samples", type=int, default=1, help="answers to each prompt (default 1)")
    written.add_argument("--keep-unfinished", action="store_true", help="also answers that were cut at their limit")
    config("compare", "train several methods on one task; writes a table, pictures and a page").add_argument(
        "--only",
        action="extend",
        type=lambda labels: labels.split(","),
        metavar="LABEL[,LABEL...]",
        help="train only these methods of the config",
    )
    config("validate", "check config, files, model and targets without running")
    config("preprocess", "show rows as they will be trained on, and audit them").add_argument(
        "--rows", type=int, default=5, help="how many rows to show (default 5)"
    )
    evaluate = verb("evaluate", "loss, perplexity and accuracy of a run, or of a config's base model")
    evaluate.add_argument("run", help="run folder, adapter folder, or a config (its base model, untuned)")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of its config")
    evaluate.add_argument("--output", help="also write the numbers to this JSON file")
    _generate(verb("generate", "stream text from a model folder, a hub id or a run folder"))
    export = verb("export", "write the tuned model as one that transformers loads")
    export.add_argument("run", help="run folder, or an adapter folder of HF PEFT or AdapterHub")
    export.add_argument(
        "--format",
        default="hf",
        choices=["hf", "peft", "adapterhub"],
        help="hf: merged weights; peft, adapterhub: the adapter alone, for that library",
    )
    export.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as loaded)"
    )
    _merge(verb("merge", "combine the adapters of several runs on one base into one"))
    back = verb("unmerge", "take what a run changed out of a merged model again: the base, for transformers")
    back.add_argument("merged", help="model folder that export wrote")
    back.add_argument("run", help="run folder, or adapter folder, that is in it")
    back.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
    back.add_argument("--rest", action="store_true", help="also where more than rounding is left over the run's base")
    _shrink(verb("shrink", "cut away what a run masked, and write the smaller model for transformers; resumes"))
    verb("methods", "list the methods, what they train and their papers").add_argument(
        "--markdown", action="store_true", help="as the table of the README"
    )
    verb("env", "print versions and devices")
    return top


def _merge(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="+", metavar="run", help="run folders, or adapter folders of HF PEFT")
    sub.add_argument("--output", required=True, help="run folder to write; must not exist or be empty")
    sub.add_argument(
        "--how",
        default="cat",
        choices=["cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "stack"],
        help="cat (default): the exact weighted sum; stack: the last run above the others, whose bottleneck adapters "
        "stay as they are; the others as HF PEFT calls them",
    )
    sub.add_argument("--weights", type=float, nargs="+", help="one a run, also negative (default: a mean)")
    sub.add_argument("--density", type=float, help="share of entries that pruning keeps (default 0.5)")
    sub.add_argument(
        "--of",
        default="adapters",
        choices=["adapters", "weights"],
        help="what is combined: what the adapters hold, as HF PEFT does, or how the weights changed, as the papers do",
    )
    sub.add_argument("--rank", type=int, help="with --of weights: keep kernels as products of this rank (by SVD)")
    sub.add_argument("--seed", type=_seed, default=0, help="of what dare_* drops")


def _shrink(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", help="run folder whose method masks units (shrink), or a config, which is trained first")
    sub.add_argument("output", help="folder to write; must not exist or be empty")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of its config")
    sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as loaded)")
    sub.add_argument("--batch", type=int, default=8, help="rows of the batch that latency is measured on (default 8)")
    sub.add_argument("--length", type=int, default=64, help="tokens of its rows (default 64)")
    sub.add_argument("--parameters", type=float, help="of a supernet: search the best mixture of sizes with this part")
    sub.add_argument("--flops", type=float, help="the same, by the part of a forward pass's FLOPs a token")
    sub.add_argument("--evaluations", type=int, help="mixtures that the search tries (default 50)")
    sub.add_argument("--metric", help="score of the held-out rows that it goes by (default loss)")
    sub.add_argument("--seed", type=_seed, help="of what it tries (default 0)")


def _generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", nargs="?", help="model folder, hub id, 'embedded', run folder, or HF PEFT adapter")
    sub.add_argument("--adapters", nargs="+", metavar="RUN", help="several runs on one base, for one batch of prompts")
    sub.add_argument("--adapter-ids", type=int, nargs="+", help="which of them answers each prompt, from 0 (in turn)")
    sub.add_argument("--prompt", action="append", default=[], help="repeat for several; without any, read from stdin")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="the prompt as it is, whatever the run was trained on")
    form.add_argument("--chat", action="store_true", help="the prompt as a user's turn, by the chat template")
    sub.add_argument("--max-new-tokens", type=int, default=None)
    sub.add_argument(
        "--temperature", type=float, default=None, help="0: greedy (default, unless the run says otherwise)"
    )
    sub.add_argument("--top-k", type=int)
    sub.add_argument("--top-p", type=float)
    sub.add_argument("--min-p", type=float)
    sub.add_argument("--seed", type=_seed, default=0)
    types = ["float32", "bfloat16", "float16"]
    sub.add_argument("--dtype", choices=types, default="float32", help="of a model that is no run")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, rest = parser().parse_known_args(argv)
    # argparse gives up on positionals that follow an option; overrides may stand anywhere.
    strange = [x for x in rest if x.startswith("-") or not hasattr(args, "overrides")]
    if strange:
        known = [o for o in _options(args.verb) if o.startswith("--")]
        raise errors.ConfigError(f"unknown argument {strange[0]!r}. {errors.did_you_mean(strange[0], known)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _options(verb: str | None) -> list[str]:
    top = parser()
    verbs = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    chosen = verbs.choices[verb] if verb else top
    return [o for a in chosen._actions for o in a.option_strings]


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. Raises TunejaxError on a user's mistake."""
    args = _parse(argv)
    if args.version:
        from importlib import metadata

        print("tunejax", metadata.version("tunejax"))
        return 0
    if args.verb is None:
        parser().print_help()
        return 0
    if getattr(args, "keys", False):
        from tunejax.config import load

        print(load.fields_help())
        return 0
    if getattr(args, "config", "") is None:
        raise errors.ConfigError(f"{args.verb} needs a config: tunejax {args.verb} CONFIG [key=value ...]")
    import importlib

    recipe = importlib.import_module(f"tunejax.recipes.{args.verb.replace('-', '_')}")
    return recipe.main(args) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console command: a user's mistake is one message on stderr and exit code 2."""
    try:
        return run(argv)
    except errors.TunejaxError as e:
        print(f"tunejax: {e}", file=sys.stderr)
        return 2
    except SystemExit as e:  # argparse's --help
        return e.code if isinstance(e.code, int) else 2
    except KeyboardInterrupt:
        print("tunejax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.filename is None:
            raise
        print(f"tunejax: cannot use {e.filename}: {e.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
