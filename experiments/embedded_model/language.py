"""Kinds of rows about language: small classification, short instructions, stories; functions as in `puzzles`."""

import random

import words as w

Row = tuple[str, str]


# ---- small classification ---------------------------------------------------------------------------------


def sentiment(r: random.Random) -> Row:
    """The tone of a templated review."""
    good = r.random() < 0.5
    first, second = r.sample(w.GOOD if good else w.BAD, 2)
    against = r.choice(w.BAD if good else w.GOOD)
    thing = r.choice(w.REVIEWED)
    text = r.choice(
        (
            f"The {thing} was {first}.",
            f"A {first} and {second} {thing}.",
            f"What a {first} {thing}, so {second}!",
            f"I thought it would be {against}, but the {thing} was {first}.",
            f"The {thing} was not {against}, it was {first}.",
            f"We found this {thing} {first} and rather {second}.",
        )
    )
    ask = r.choice(("Is this review positive or negative?", "Review: positive or negative?"))
    return f"{ask} {text}", "positive" if good else "negative"


def topic(r: random.Random) -> Row:
    """The topic of a templated headline."""
    name = r.choice(list(w.TOPICS))
    nouns, frames = w.TOPICS[name]
    return f"Topic: {', '.join(w.TOPICS)}? {r.choice(frames).format(*r.sample(nouns, 2))}", name


def kind(r: random.Random) -> Row:
    """What sort of thing a word names."""
    name, group = r.choice((("animal", w.ANIMALS), ("food", w.FOODS), ("place", w.PLACES), ("colour", w.COLOURS)))
    return f"Animal, food, place or colour: {r.choice(group)}?", name


# ---- short instructions -----------------------------------------------------------------------------------


def fact(r: random.Random) -> Row:
    """Opposites, plurals, sounds of animals."""
    which = r.randrange(3)
    if which == 0:
        pair = r.choice(w.OPPOSITES).split()
        a, b = pair if r.random() < 0.5 else pair[::-1]
        return r.choice((f'What is the opposite of "{a}"?', f"Opposite of {a}:")), b
    if which == 1:
        a, b = r.choice(w.PLURALS).split() if r.random() < 0.4 else ((x := r.choice(w.THINGS)), w.plural(x))
        return f'What is the plural of "{a}"?', b
    a, b = r.choice(w.SOUNDS).split()
    return f"What does a {a} do?", f"A {a} {b}."


def follow(r: random.Random) -> Row:
    """What comes after or before in a well-known order."""
    chain = r.choice(w.CHAINS).split()
    i = r.randrange(len(chain) - 1)
    if r.random() < 0.6:
        return f"What comes after {chain[i]}?", chain[i + 1]
    return f"What comes before {chain[i + 1]}?", chain[i]


def obey(r: random.Random) -> Row:
    """Repeat, write in capitals, say several times, make a list or a sentence."""
    some = r.sample(w.WORDS, r.randint(1, 4))
    word, times = some[0], r.randint(2, 4)
    name, verb, place = r.choice(w.NAMES), r.choice(w.VERBS), r.choice(w.PLACES)
    return r.choice(
        (
            (f"Repeat: {' '.join(some)}", " ".join(some)),
            (f'Say "{word}" {("two", "three", "four")[times - 2]} times.', " ".join([word] * times)),
            (f"Write in capitals: {word}", " ".join(word.upper())),
            (f"Make a list of these: {' '.join(some)}", "\n".join(f"- {x}" for x in some)),
            (f"Write a sentence with {name}, {verb} and {place}.", f"{name} likes to {verb} in the {place}."),
            (f'Answer with "{word}".', word),
        )
    )


def lookup(r: random.Random) -> Row:
    """A question about a fact that the prompt states."""
    names = r.sample(w.NAMES, r.randint(2, 3))
    things = r.sample(w.THINGS + w.FOODS, len(names))
    i = r.randrange(len(names))
    text = " ".join(f"{n} has a {t}." for n, t in zip(names, things, strict=True))
    if r.random() < 0.5:
        return f"{text} What does {names[i]} have?", f"a {things[i]}"
    return f"{text} Who has the {things[i]}?", names[i]


def story(r: random.Random) -> Row:
    """A short story, plain or asked for."""
    name, friend = r.sample(w.NAMES, 2)
    animal, thing, food = r.choice(w.ANIMALS), r.choice(w.THINGS), r.choice(w.FOODS)
    place, colour, verb = r.choice(w.PLACES), r.choice(w.COLOURS), r.choice(w.VERBS)
    start = r.choice((f"Once there was a {animal} named {name}.", f"{name} was a little {animal}."))
    wish = r.choice((f"{name} liked to {verb} in the {place}.", f"Every day {name} went to the {place} to {verb}."))
    turn = r.choice(
        (
            f"One day {name} found a {colour} {thing}.",
            f"One day {name} lost a {colour} {thing} and was sad.",
            f"One day {name} met {friend}, who had a {colour} {thing}.",
        )
    )
    help_ = r.choice((f"{friend} came to help.", f'"Can I play too?" asked {friend}.', f"{friend} was hungry."))
    end = r.choice(
        (
            f"They shared some {food} and were happy.",
            f"They looked at the {thing} together until night.",
            f"In the end they were friends and went home to eat {food}.",
        )
    )
    text = " ".join((start, wish, turn, help_, end))
    if r.random() < 0.5:
        return "", text
    return f"Tell a short story about a {animal} named {name}.", text
