"""The dialogue of ``hf-ext demo``: facts told once, a long talk about other things, and the questions at the end.

There are four versions of the dialogue, alike but for the words told: every word is the right answer in exactly one
version, so whoever has forgotten, whatever its preferences, can be right in no more than one of four on average.
"""

OPENING = "Please remember these secret words."
OPENING_ANSWER = "I will remember them."
FACT = "The secret word for the {place} is {word}."
QUESTION = "What is the secret word for the {place}?"
ANSWER = "The secret word for the {place} is"

WORDS: dict[str, tuple[str, str, str, str]] = {
    "red door": ("pumpkin", "violin", "rocket", "glacier"),
    "blue safe": ("marble", "walnut", "falcon", "candle"),
    "garden gate": ("turtle", "hammer", "dolphin", "ribbon"),
    "old tower": ("pepper", "anchor", "mirror", "tiger"),
    "black box": ("lemon", "piano", "desert", "button"),
    "kitchen drawer": ("feather", "castle", "basket", "saddle"),
}

TALK: tuple[tuple[str, str], ...] = (
    ("How many days are there in a leap year?", "A leap year has 366 days. It comes every four years."),
    (
        "Why is the sky blue?",
        "The air scatters blue light from the sun more than red light, so blue reaches us from everywhere.",
    ),
    (
        "What do bees make?",
        "Bees make honey from the nectar of flowers. They also make wax, from which they build their combs.",
    ),
    (
        "Who wrote Romeo and Juliet?",
        "William Shakespeare wrote the play Romeo and Juliet near the end of the sixteenth century.",
    ),
    (
        "What is the largest ocean?",
        "The Pacific Ocean is the largest. It covers about a third of the surface of the Earth.",
    ),
    (
        "How do plants make their food?",
        "Plants use photosynthesis. They turn sunlight, water and carbon dioxide into sugar and oxygen.",
    ),
    (
        "What is a prime number?",
        "A prime number is greater than 1 and has no divisors other than 1 and itself, such as 7 or 13.",
    ),
    (
        "Why do we have seasons?",
        "The axis of the Earth is tilted, so each half of it leans toward the sun for a part of the year.",
    ),
    (
        "What does a thermometer measure?",
        "A thermometer measures temperature, often by how far a liquid expands in a thin tube.",
    ),
    ("How many legs does a spider have?", "A spider has eight legs, two more than an insect."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo, one of the largest cities in the world."),
    (
        "How is paper made?",
        "Wood is cut into small pieces and cooked into a pulp, which is spread out, pressed flat and dried.",
    ),
    (
        "What is gravity?",
        "Gravity is the force by which bodies attract each other. It keeps the planets in their orbits.",
    ),
    (
        "Why is the sea salty?",
        "Rivers carry minerals from the rocks into the sea. The water evaporates, and the salt stays.",
    ),
    ("What is a verb?", "A verb is a word that describes an action or a state, such as run, think or be."),
    ("How do airplanes fly?", "The wings push air down as the plane moves forward, and the air pushes the wings up."),
    (
        "What causes rain?",
        "Warm air rises and cools, and its water vapor gathers into drops, which fall when they are heavy.",
    ),
    (
        "What is the smallest planet?",
        "Mercury is the smallest planet of the solar system and also the one nearest to the sun.",
    ),
    (
        "How does a battery work?",
        "A chemical reaction inside the battery moves electrons from one end to the other through a wire.",
    ),
    (
        "What is bread made of?",
        "Bread is made of flour, water, yeast and a little salt. The yeast makes the dough rise.",
    ),
    ("What is the square root of 81?", "The square root of 81 is 9, because 9 times 9 is 81."),
    (
        "Why do cats purr?",
        "Cats purr when they are content, and sometimes to calm themselves when they are afraid or hurt.",
    ),
    ("What is an island?", "An island is land with water on all sides. Greenland is the largest one on Earth."),
    (
        "How do magnets work?",
        "The tiny magnetic fields of their atoms point the same way, and so they add up to a strong one.",
    ),
)
