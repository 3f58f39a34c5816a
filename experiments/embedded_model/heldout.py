"""Three kinds of task that the embedded model has never seen, so that tuning on them shows something.

`errands` (the quickstart): who helps with what somebody asks for. The model knows the words, but neither the question
nor its answers, and the rows to evaluate on ask for things that no row to train on names: it takes what was learned
before. `route`: which desk answers a customer's message, in words that are new too. `coins`: track the state of a coin.
Run as a script it writes the rows that the package ships:

    python experiments/embedded_model/heldout.py
"""

# Long word lists read best as text.
# ruff: noqa: SIM905

import json
import random
from collections.abc import Callable
from pathlib import Path

import words as w

Row = tuple[str, str]
TASKS = Path(__file__).resolve().parents[2] / "tunejax" / "assets" / "tasks"

HELPERS = {"vet": w.ANIMALS, "grocer": w.FOODS, "guide": w.PLACES, "painter": w.COLOURS}
ERRANDS = (
    "{n} asks about {a}.",
    "{n} looks for {a} and {b}.",
    "It is {d} and {n} needs {a}.",
    "{n} and {m} talk about {a} or {b}.",
    "Can you tell {n} more of {a}?",
    "First {a}, then {b}, says {n}.",
)

ITEMS = "parcel jacket phone lamp watch desk bike camera printer carpet".split()
DESKS = {
    "billing": (
        "I was charged twice for the {i}",
        "the price on my invoice is wrong",
        "please refund the {i}, I paid on {d}",
        "my card was billed but I have no receipt",
        "the discount is missing from my payment",
        "why did I pay a fee in {m}?",
    ),
    "delivery": (
        "my {i} has not arrived",
        "the driver left the {i} at the wrong door",
        "the tracking says it was shipped on {d}",
        "can you send the {i} to a new address?",
        "when will the {i} be delivered?",
        "the courier never came on {d}",
    ),
    "account": (
        "I forgot my password",
        "the login page shows an error since {d}",
        "please change the email in my profile",
        "I cannot sign in to the app",
        "delete my user data, I registered in {m}",
        "the code for my username does not work",
    ),
    "thanks": (
        "the {i} is exactly what I hoped for",
        "your team was so kind on {d}",
        "I will tell my friends about the {i}",
        "five stars from our whole family",
        "I am very pleased with the service in {m}",
        "it works better than I dreamed",
    ),
}
OPENINGS = ("Hello,", "Hi,", "Dear team,", "Good morning,", "This is {n}.", "{n} here:", "Excuse me,", "")
CLOSINGS = ("Regards, {n}", "{n}", "Please answer soon.", "Bye, {n}", "")


def errands(r: random.Random, evaluate: bool) -> Row:
    """What somebody asks for, and who helps: vet, grocer, guide or painter. Every third thing is for evaluation."""
    helper = r.choice(list(HELPERS))
    things = [x for i, x in enumerate(HELPERS[helper]) if (i % 3 == 0) == evaluate]
    (a, b), (n, m) = r.sample(things, 2), r.sample(w.NAMES, 2)
    text = r.choice(ERRANDS).format(a=a, b=b, n=n, m=m, d=r.choice(w.CHAINS[0].split()))
    return f"Who can help? {text}", helper


def route(r: random.Random, evaluate: bool) -> Row:
    """A message of one or two sentences, and its desk: billing, delivery, account or thanks."""
    desk = r.choice(list(DESKS))
    frames = r.sample(DESKS[desk], r.randint(1, 2))
    values = {
        "n": r.choice(w.NAMES),
        "i": r.choice(ITEMS),
        "d": r.choice(w.CHAINS[0].split()),
        "m": r.choice(w.CHAINS[1].split()),
    }
    body = " ".join(f[0].upper() + f[1:] + ("" if f.endswith("?") else ".") for f in frames)
    message = " ".join(x for x in (r.choice(OPENINGS), body, r.choice(CLOSINGS)) if x).format(**values)
    return f"Which desk? {message}", desk


def coins(r: random.Random, evaluate: bool) -> Row:
    """Whether a coin still lies heads up after some people did or did not flip it, with the state step by step."""
    names = r.sample(w.NAMES, r.randint(2, 4))
    flips = [r.random() < 0.5 for _ in names]
    text = " ".join(f"{n} {'flips' if f else 'does not flip'} the coin." for n, f in zip(names, flips, strict=True))
    up, steps = True, []
    for name, flip in zip(names, flips, strict=True):
        up ^= flip
        steps.append(f"{name}: {'heads' if up else 'tails'}")
    return f"A coin is heads up. {text} Is it still heads up?", f"{', '.join(steps)}. Answer: {'yes' if up else 'no'}"


KINDS: dict[str, Callable[[random.Random, bool], Row]] = {"errands": errands, "route": route, "coins": coins}


def rows(
    name: str, number: int, seed: int, evaluate: bool, without: set[str] | frozenset[str] = frozenset()
) -> list[Row]:
    """``number`` rows of different prompts, none of them among ``without``."""
    r = random.Random(f"{name} {seed} {evaluate}")
    found: dict[str, Row] = {}
    while len(found) < number:
        row = KINDS[name](r, evaluate)
        if row[0] not in without:
            found.setdefault(row[0], row)
    return list(found.values())


def write(name: str, train: int, evaluate: int, seed: int = 0) -> None:
    """NAME_train.jsonl and NAME_eval.jsonl in the package, no prompt in both."""
    learned = rows(name, train, seed, False)
    kept = rows(name, evaluate, seed, True, {prompt for prompt, _ in learned})
    TASKS.mkdir(parents=True, exist_ok=True)
    for split, some in (("train", learned), ("eval", kept)):
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in some]
        (TASKS / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name_ in KINDS:
        write(name_, 1000, 200)
