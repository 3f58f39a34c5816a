"""Kinds of rows with steps: arithmetic and word puzzles. Each function: (random state) -> (prompt, completion)."""

import random

import words as w

Row = tuple[str, str]


def _distinct(r: random.Random, low: int, high: int) -> list[str]:
    return r.sample(w.WORDS, r.randint(low, high))


# ---- arithmetic, steps written out ------------------------------------------------------------------------


def add(r: random.Random) -> Row:
    """Two numbers below 100, digit by digit from the right."""
    a, b = (r.randint(0, 9), r.randint(0, 9)) if r.random() < 0.25 else (r.randint(1, 99), r.randint(1, 99))
    ask = r.choice(("What is {} + {}?", "Add {} and {}.", "{} + {} = ?")).format(a, b)
    if a < 10 and b < 10:
        return ask, f"{a} + {b} = {a + b}. Answer: {a + b}"
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    steps = f"Ones: {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}. "
    steps += f"Tens: {a // 10} + {b // 10} + {carry} = {tens}. "
    return ask, steps + f"Answer: {a + b}"


def subtract(r: random.Random) -> Row:
    """A number below 100 minus a smaller one, digit by digit."""
    a, b = sorted((r.randint(0, 99), r.randint(0, 99)), reverse=True)
    ask = r.choice(("What is {} - {}?", "Take {1} from {0}.", "{} - {} = ?")).format(a, b)
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    tens = a // 10 - borrow
    steps = f"Ones: {ones} - {b % 10} = {ones - b % 10}, borrow {borrow}. "
    steps += f"Tens: {tens} - {b // 10} = {tens - b // 10}. "
    return ask, steps + f"Answer: {a - b}"


def multiply(r: random.Random) -> Row:
    """The small times table."""
    a, b = r.randint(0, 10), r.randint(0, 10)
    ask = r.choice(("What is {} x {}?", "Multiply {} by {}.")).format(a, b)
    return ask, f"{a} x {b} = {a * b}. Answer: {a * b}"


def bigger(r: random.Random) -> Row:
    """The larger or smaller of two numbers."""
    a, b = r.sample(range(100), 2)
    if r.random() < 0.5:
        return f"Which is bigger, {a} or {b}?", str(max(a, b))
    return f"Which is smaller, {a} or {b}?", str(min(a, b))


def story_sum(r: random.Random) -> Row:
    """A word problem of one or two steps."""
    (name, other), thing = r.sample(w.NAMES, 2), r.choice(w.THINGS)
    a, b, c = r.randint(4, 12), r.randint(1, 8), r.randint(1, 3)
    things, more = w.plural(thing), r.random() < 0.5
    text = f"{name} has {a} {things}. "
    text += f"{other} gives {name} {b} more. " if more else f"{name} gives {other} {min(a, b)}. "
    now = a + b if more else a - min(a, b)
    steps = f"{a} + {b} = {now}. " if more else f"{a} - {min(a, b)} = {now}. "
    if r.random() < 0.4 and now >= c:
        text, steps, now = text + f"{name} loses {c}. ", steps + f"{now} - {c} = {now - c}. ", now - c
    return text + f"How many {things} does {name} have?", steps + f"Answer: {now}"


# ---- word puzzles -----------------------------------------------------------------------------------------


def spell(r: random.Random) -> Row:
    """The letters of a word."""
    word = r.choice(w.WORDS)
    return f'Spell "{word}".', " ".join(word)


def reverse(r: random.Random) -> Row:
    """A word backwards, through its letters."""
    word = r.choice(w.WORDS)
    return f'Reverse the word "{word}".', f"{' '.join(word)} -> {' '.join(reversed(word))}"


def reverse_list(r: random.Random) -> Row:
    """A list backwards."""
    some = _distinct(r, 2, 4)
    return f"Reverse the list: {', '.join(some)}.", ", ".join(reversed(some))


def letters(r: random.Random) -> Row:
    """The first or the last letters of some words, one by one, then together."""
    some, last = _distinct(r, 2, 4), r.random() < 0.5
    which = "last" if last else "first"
    found = [x[-1] if last else x[0] for x in some]
    steps = ", ".join(f"{x}: {c}" for x, c in zip(some, found, strict=True))
    return f"Take the {which} letter of each word: {' '.join(some)}.", f"{steps}. Answer: {' '.join(found)}"


def sort(r: random.Random) -> Row:
    """Words in alphabetical order, or numbers in rising order."""
    if r.random() < 0.5:
        some = _distinct(r, 2, 4)
        return f"Sort the words: {', '.join(some)}.", ", ".join(sorted(some))
    numbers = r.sample(range(100), r.randint(2, 4))
    return f"Sort the numbers: {', '.join(map(str, numbers))}.", ", ".join(map(str, sorted(numbers)))


def count(r: random.Random) -> Row:
    """How many words, or how many letters."""
    if r.random() < 0.5:
        some = [r.choice(w.WORDS) for _ in range(r.randint(1, 6))]
        steps = ", ".join(f"{i + 1} {x}" for i, x in enumerate(some))
        return f"Count the words: {' '.join(some)}.", f"{steps}. Answer: {len(some)}"
    word = r.choice(w.WORDS)
    steps = ", ".join(f"{i + 1} {c}" for i, c in enumerate(word))
    return f'How many letters are in "{word}"?', f"{steps}. Answer: {len(word)}"


def member(r: random.Random) -> Row:
    """Whether a word is in a list."""
    some = _distinct(r, 3, 5)
    word = r.choice(some) if r.random() < 0.5 else r.choice(w.WORDS)
    return f'Is "{word}" in the list: {", ".join(some)}?', "yes" if word in some else "no"
