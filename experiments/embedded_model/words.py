"""The words that the generated text is made of."""

# Long word lists read best as text.
# ruff: noqa: SIM905

ANIMALS = (
    "cat dog bird fish frog mouse horse sheep goat duck hen fox bear wolf lion tiger rabbit turtle snail bee ant owl "
    "pig cow deer crab seal whale"
).split()
FOODS = (
    "apple bread cheese soup rice cake pie pear plum lemon carrot potato tomato onion honey butter milk egg nut "
    "grape melon salad pasta"
).split()
THINGS = (
    "ball box book boat bell cup hat key lamp map pen kite drum coat shoe rope stone shell coin chair table basket "
    "bottle button ladder mirror pillow ribbon bucket candle"
).split()
PLACES = "park garden forest river lake beach hill farm school market kitchen town house barn bridge cave".split()
COLOURS = "red blue green yellow brown black white pink orange purple grey".split()
VERBS = "run jump sing walk swim read draw cook play dance climb sleep write paint laugh dig".split()
OTHERS = (
    "north south winter summer happy quiet little early window street paper silver morning evening friend winner "
    "corner letter number sugar water cloud storm music story dream light night day sun moon star wind rain snow"
).split()
NAMES = "Tom Anna Ben Lucy Sam Mia Max Ella Leo Ruby Jack Nora Tim Rosa Paul Ivy Kate Finn Lily Omar Zoe Hugo".split()

WORDS = ANIMALS + FOODS + THINGS + PLACES + COLOURS + VERBS + OTHERS

OPPOSITES = (
    "hot cold;big small;up down;fast slow;happy sad;light dark;wet dry;old new;hard soft;loud quiet;full empty;"
    "open closed;early late;near far;high low;left right;day night;first last;rich poor;strong weak;clean dirty;"
    "thick thin;long short;good bad;true false;yes no;in out;front back"
).split(";")
PLURALS = "mouse mice;sheep sheep;goose geese;child children;foot feet;tooth teeth;man men;fish fish".split(";")
SOUNDS = (
    "dog barks;cat meows;cow moos;duck quacks;sheep bleats;lion roars;bee buzzes;owl hoots;horse neighs;pig oinks;"
    "frog croaks;wolf howls"
).split(";")
CHAINS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve",
    "spring summer autumn winter",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
)

GOOD = (
    "great wonderful lovely funny brilliant charming superb excellent delightful fresh clever warm moving perfect "
    "enjoyable"
).split()
BAD = (
    "terrible boring awful dull weak bad poor silly slow cold stale tedious dreadful clumsy annoying disappointing"
).split()
REVIEWED = "film book song play show meal concert game story cake hotel album soup restaurant lesson".split()

TOPICS = {
    "sports": (
        "team goal match player coach race runner stadium score cup league ball won lost fans".split(),
        ("The {} surprised the {} in the last minute.", "A {} and a new {} before the final.", "Every {} saw the {}."),
    ),
    "food": (
        "bread soup cook oven recipe sugar kitchen salad butter chef dinner cheese plate spoon pie".split(),
        ("Put the {} beside the {} and stir.", "The {} needs a good {}.", "Warm {} goes well with {}."),
    ),
    "weather": (
        "rain storm snow wind cloud sun frost fog thunder heat ice shower forecast sky hail".split(),
        ("The {} comes with {} tonight.", "After the {} we expect {}.", "More {} and some {} in the north."),
    ),
    "music": (
        "song drum guitar singer piano band choir melody violin album tune rhythm stage concert flute".split(),
        ("The {} and the {} began softly.", "A new {} for the old {}.", "She wrote a {} about a {}."),
    ),
}


def plural(word: str) -> str:
    """The regular plural."""
    return word + ("es" if word.endswith(("x", "sh", "ch", "s")) else "s")
