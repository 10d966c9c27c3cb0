"""Synthetic conversations for the demo checkpoint: small talk, a little world, checkable skills.

Everything is drawn from a seeded `random.Random`, so a seed fixes the data. Data (words,
phrasings, the world) come first, code after them. A *skill* is a function from a `Talk` (the state
of one conversation) to a `Turn` (a question and its answer).

Phrasings use a small pattern language: `[a|b|]` picks one alternative, `{slot}` is filled in later.

Held-out questions: every question has a key (the numbers to add, the letters to sort, the wording
of a question about the world, ...). A checksum of the key puts one key in ten on the held-out side.
Training never draws from that side; the question file draws from nowhere else.

    python scripts/demo_data.py --show 3                                print three conversations
    python scripts/demo_data.py --questions mlx_loop/demo/questions.jsonl     write the questions
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Message = dict[str, str]

QUESTION_SEED = 2026
MAX_HOPS = 2  # longest chain of assignments that is asked for

# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------

NOUNS = """
acorn amber anchor apple arrow ball banana bank barrel basket beach bear bell bicycle bird blanket
boat book bottle box branch bread bridge brush bucket bus butter button cactus cake camel camera
candle car card carpet castle cave chain chair cheese cherry chicken church circle clock cloud coat
coffee coin comet computer cow crown cup curtain desert desk diamond dolphin donkey door dragon
dress drum duck eagle ear earth egg elephant engine eye farm feather fence field finger fire fish
flag flower fly football forest fork fox frog fruit garden gate ghost giant giraffe glass glove goat
grass guitar hammer hand hat heart hedgehog hill hole honey horse hospital hotel house ice island
jacket jar juice key king kitchen kite knife knight ladder lake lamp leaf lemon letter library lion
lizard lock machine map market meadow milk mirror money monkey moon moss mountain mouse mushroom
music needle nest ocean office onion orange owl paint palace panda paper park peach pebble pen
pencil penguin phone picture pig pillow pirate pizza planet plant plate pocket pond potato princess
queen rabbit radio rain ring river road robot rock roof room rope rose sand school scissors sea
shadow shark sheep shell ship shirt shoe shop silk sky snail snake snow sock song soup spider spoon
spring star station stone storm street sugar summer sun swan sword table tea teacher tent theatre
ticket tiger tomato tower town toy train tree tunnel turtle umbrella valley village violin volcano
wagon wall watch water wave whale wheel wind window winter witch wizard wolf wood wool worm zebra
""".split()

ADJECTIVES = """
angry big black blue brave bright broken brown busy calm cheap clean clever cold cosy crazy cute
dangerous dark deep dirty dry dusty easy empty expensive fair famous fast fat flat free fresh funny
gentle golden good great green grey happy hard heavy high hot huge hungry important kind late lazy
light little long loud lucky narrow new nice noisy odd old orange pale pink plain poor pretty proud
purple quick quiet rare red rich round rough sad safe sharp short shy silly silver simple slow
small smart smooth soft sour strange strong sweet tall tasty thick thin tidy tiny tired ugly warm
weak wet white wide wild wise wooden yellow young
""".split()

VERBS = """
bake believe borrow break bring build burn buy carry catch change choose clean climb close cook
copy count cut dance design destroy dig draw dream drink drive drop eat explain feed fight fill
find finish fix fly fold follow forget freeze give grow hate hear help hide hit hold imagine improve
invent invite jump keep kick know laugh learn leave lift listen lose love make measure melt mix move
open order pack paint pay plan plant play pull push put read remove rent repair ride run save see
sell send sew share show sing sit sleep smell solve speak spend stop study swim take taste teach
throw touch train travel understand use visit wait walk wash watch wear win write
""".split()

TOPICS = [
    "algebra", "art", "astronomy", "baseball", "biology", "black holes", "chemistry", "chess",
    "climate change", "cooking", "dinosaurs", "economics", "electricity", "evolution", "fashion",
    "gravity", "geography", "history", "jazz", "law", "literature", "logic", "machine learning",
    "magnetism", "mathematics", "medicine", "neural networks", "philosophy", "photosynthesis",
    "physics", "poetry", "politics", "programming", "psychology", "quantum physics", "relativity",
    "religion", "robotics", "space travel", "sport", "tennis", "thermodynamics", "time travel",
]  # fmt: skip

PLACES = """
Africa America Argentina Asia Australia Austria Berlin Brazil Canada Chile China Cuba Denmark Egypt
England Europe Finland France Germany Greece Hungary India Ireland Italy Japan Kenya London Madrid
Mexico Moscow Norway Paris Peru Poland Portugal Rome Russia Scotland Spain Sweden Switzerland Texas
Tokyo Turkey Vienna
""".split()

FAMOUS = [
    "Albert Einstein", "Isaac Newton", "Marie Curie", "Shakespeare", "Mozart", "Beethoven",
    "Napoleon", "Cleopatra", "Leonardo da Vinci", "Picasso", "Darwin", "Columbus", "Plato",
    "Alan Turing", "Ada Lovelace", "the president", "the king of England", "Harry Potter",
    "Sherlock Holmes", "Batman", "Bill Gates", "the pope", "Goethe", "Elvis", "Julius Caesar",
]  # fmt: skip

LANGUAGES = """
Chinese Danish Dutch English French German Greek Hindi Italian Japanese Latin Polish Portuguese
Russian Spanish Swedish Turkish Python Java JavaScript Rust C++ HTML SQL bash
""".split()

NAMES = """
Aaron Adam Alex Alice Amy Andrew Angela Anna Anton Arthur Barbara Bella Bill Bob Brian Carl Carla
Charles Charlie Chris Daniel David Diana Elena Ella Emil Emily Emma Eric Erik Eva Felix Fiona Frank
Frida George Grace Greta Hannah Harry Heidi Helen Henry Ivan Jack James Jan Jane Jim Joe John Jonas
Judy Julia Karl Kate Kevin Kim Lara Laura Lily Linda Lisa Lucy Luis Luke Maria Marie Mark Martin
Mary Max Michael Mike Nick Nina Olga Oliver Olivia Omar Peter Philip Rachel Rita Robert Rosa Sam
Sara Sarah Simon Sofia Sophie Stefan Steve Susan Theo Thomas Tim Tina Victor Walter Will Yuki Zoe
""".split()

SYLLABLES = """
ba bo da do el en fa fi go ha ja ka ki la lo ma mi mo na ni or pa ra ri sa ta tu vi zo
""".split()

# ---------------------------------------------------------------------------------------------
# The little world
# ---------------------------------------------------------------------------------------------

WORLD_TABLE = """
who    town      job        pet      colour  food      instrument
Mia    Norwick   baker      cat      green   soup      piano
Tom    Elmford   teacher    dog      red     pasta     drums
Lena   Brindle   doctor     parrot   yellow  plums     cello
Oskar  Marrow    sailor     goat     blue    bread     trumpet
Nora   Pinehill  painter    fox      white   honey     harp
Ben    Tarnby    farmer     duck     brown   beans     banjo
Ida    Westmere  singer     turtle   purple  rice      flute
Paul   Larkton   carpenter  rabbit   grey    cheese    tuba
Ruth   Dunmoor   tailor     snake    black   salad     violin
Leo    Stonebay  driver     hamster  pink    pizza     guitar
Clara  Fenwell   gardener   pony     silver  cake      horn
Hugo   Quayle    writer     mouse    gold    pancakes  whistle
"""
_HEADER, *_ROWS = (line.split() for line in WORLD_TABLE.strip().splitlines())
WORLD: dict[str, dict[str, str]] = {row[0]: dict(zip(_HEADER, row, strict=True)) for row in _ROWS}


@dataclass(frozen=True)
class Attribute:
    """How one column of the world is spoken of; `{who}` and `{value}` are slots."""

    tell: str  # the answer to a question about a person
    short: str  # the answer to a two-hop question
    ask: tuple[str, ...]
    inverse: tuple[str, ...]  # questions that lead from the value to the person
    refer: tuple[str, ...]  # descriptions of the person by the value


ATTRIBUTES = {
    "town": Attribute(
        tell="{who} lives in {value}.",
        short="In {value}.",
        ask=(
            "where does {who} live?",
            "[which|what] town does {who} live in?",
            "in [which|what] town does {who} live?",
            "where is {who} from?",
            "where is the home of {who}?",
            "[tell me|do you know] where {who} lives",
        ),
        inverse=("who lives in {value}?", "who is from {value}?", "who has a home in {value}?"),
        refer=("the [person|one] from {value}", "the [person|one] who lives in {value}"),
    ),
    "job": Attribute(
        tell="{who} is a {value}.",
        short="A {value}.",
        ask=(
            "what is {who}'s job?",
            "what does {who} do [for a living|for work|at work|all day]?",
            "what is the job of {who}?",
            "[what|which] job does {who} have?",
            "what does {who} work as?",
            "[tell me|do you know] the job of {who}",
        ),
        inverse=(
            "who is [the|a] {value}?",
            "who works as a {value}?",
            "what is the name of the {value}?",
        ),
        refer=("the {value}", "the [person|one] who works as a {value}"),
    ),
    "pet": Attribute(
        tell="{who} has a {value}.",
        short="A {value}.",
        ask=(
            "[what|which] pet does {who} have?",
            "[what|which] animal does {who} have?",
            "what is {who}'s pet?",
            "what kind of pet does {who} own?",
            "does {who} have a pet?",
            "[tell me|do you know] the pet of {who}",
        ),
        inverse=("who has [the|a] {value}?", "who owns the {value}?", "whose pet is the {value}?"),
        refer=("the owner of the {value}", "the [person|one] with the {value}"),
    ),
    "colour": Attribute(
        tell="{who} likes the colour {value}.",
        short="{value}.",
        ask=(
            "what is {who}'s favo[u|]rite colo[u|]r?",
            "[what|which] colo[u|]r does {who} like [|most|best]?",
            "what is the favo[u|]rite colo[u|]r of {who}?",
            "[tell me|do you know] the favo[u|]rite colo[u|]r of {who}",
        ),
        inverse=(
            "who likes the colo[u|]r {value}?",
            "whose favo[u|]rite colo[u|]r is {value}?",
            "who likes {value} [best|most]?",
        ),
        refer=("the [person|one] who likes {value}", "the fan of the colo[u|]r {value}"),
    ),
    "food": Attribute(
        tell="{who} likes to eat {value}.",
        short="{value}.",
        ask=(
            "what does {who} like to eat?",
            "what food does {who} like?",
            "what is {who}'s favo[u|]rite food?",
            "what does {who} eat?",
            "what is the favo[u|]rite food of {who}?",
            "[tell me|do you know] what {who} likes to eat",
        ),
        inverse=(
            "who likes to eat {value}?",
            "who eats {value}?",
            "whose favo[u|]rite food is {value}?",
        ),
        refer=("the [person|one] who eats {value}", "the [person|one] who likes to eat {value}"),
    ),
    "instrument": Attribute(
        tell="{who} plays the {value}.",
        short="The {value}.",
        ask=(
            "what does {who} play?",
            "[what|which] instrument does {who} play?",
            "what is {who}'s instrument?",
            "what music does {who} make?",
            "[tell me|do you know] the instrument of {who}",
        ),
        inverse=("who plays the {value}?", "who can play the {value}?", "who has a {value}?"),
        refer=("the {value} player", "the [person|one] who plays the {value}"),
    ),
}

ABOUT = (
    "[tell me about|tell me something about|who is|what do you know about|describe] {who}?",
    "{who}?",
    "do you know {who}?",
)
ABOUT_ANSWER = "{who} is a {job} from {town} and has a {pet}."

# ---------------------------------------------------------------------------------------------
# Small talk: intent -> (what users say, what the model answers)
# ---------------------------------------------------------------------------------------------

EXAMPLES = (
    "what is 27 + 45?",
    "what is 12 + 30?",
    "what is 7 + 8?",
    "sort d b a c",
    "reverse s t o n e",
    "how many a in b a n a n a?",
    "where does Mia live?",
    "what pet does the baker have?",
    "tell me a story about a fox",
    "tell me a joke",
    "ask me a riddle",
    "what can you do?",
    "my name is Anna",
)

CHAT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "greet": (
        (
            "[hi|hello|hey|hi|hello|hey|hiya|yo|hallo|howdy|greetings|good day] [there|model||||]!",
            "[hi|hello|hey] [there|]! [nice to meet you|nice to see you|i am new here]!",
            "good [morning|evening|afternoon]!",
            "[hello|hi] hello!",
            "[hi|hello|hey], can we [talk|chat]?",
            "[hi|hello|hey], are you there?",
            "[let's|let us|can we|i want to] [talk|chat].",
        ),
        (
            "Hello! I am a tiny demo model. Ask me what I can do.",
            "Hi there! Would you like a riddle?",
            "Hello! Nice to meet you. Try: {example}",
        ),
    ),
    "how": (
        (
            "how are [you|u] [doing|today||]?",
            "how is it going?",
            "how's it going?",
            "[hi|hello|hey][,|] how are [you|u]?",
            "what's up?",
            "[whats|wassup|sup] up?",
            "how do you [do|feel]?",
            "are you [ok|well|fine|happy|tired]?",
            "how was your day?",
            "how have you been?",
            "you ok?",
        ),
        ("I am fine, thank you! How are you?", "Very well, thank you! And you?"),
    ),
    "user_good": (
        (
            "[i am|i'm|im|i feel|] [fine|good|well|great|happy|very well|ok]"
            "[, thanks|, thank you| too||]!",
            "not bad[, thanks|]!",
            "[all good|doing well|pretty good|very good][, thanks|]!",
            "i am fine[, and you|, how are you]?",
        ),
        ("Good to hear! What shall we do? Try: {example}", "I am glad! Would you like a riddle?"),
    ),
    "user_bad": (
        (
            "[i am|i'm|im|i feel] [so|very|a bit|] "
            "[sad|tired|bored|lonely|sick|bad|angry|unhappy|stressed|not well].",
            "[not so good|not well|terrible|bad|so so].",
            "i had a bad day.",
        ),
        (
            "I am sorry to hear that. Would you like a story?",
            "Oh dear, I hope it gets better soon. Would you like a joke?",
        ),
    ),
    "thanks": (
        (
            "[thanks|thank you|thx|thank u|many thanks|thanks a lot|thank you very much|ty]!",
            "thank you[, that helped|, well done|, very nice|, friend]!",
        ),
        ("You are welcome!", "My pleasure!"),
    ),
    "bye": (
        (
            "[bye|goodbye|bye bye|see you|see you later|farewell|good night|cya|ciao|take care]!",
            "[i have to go|i must go|i am leaving|time to go|that's all][, bye|]!",
            "have a [nice|good] day!",
        ),
        ("Goodbye! It was nice to talk to you.", "Bye! Come back soon."),
    ),
    "who": (
        (
            "[who|what] are [you|u] [exactly||]?",
            "what is your name?",
            "what's your name?",
            "do you have a name?",
            "how are you called?",
            "who am i [talking|speaking|chatting] [to|with]?",
            "tell me about yourself.",
            "introduce yourself.",
            "[which|what] model are you?",
            "what kind of [model|ai|bot] are you?",
            "are you [a model|a demo|an ai|a bot|a robot|a computer|a machine|a human|human|real|"
            "alive|a person|chatgpt|smart|intelligent|conscious]?",
        ),
        (
            "I am a tiny demo model, a small neural network that learned from invented talks.",
            "I am a tiny demo model. I am too small to know the real world, but I have skills.",
        ),
    ),
    "can": (
        (
            "what can [you|u] do [for me|here|]?",
            "what do you do?",
            "what are [you able to do|your skills|you good at|your abilities]?",
            "[help|help me|help please]!",
            "can you help [me|]?",
            "how can you help [me|]?",
            "[i need|i want] help.",
            "what [can|should|could|do] i [ask|ask you|say|type|do] [now|here|]?",
            "how [does this|do you] work?",
            "what do you know?",
            "what now?",
            "[show me what you can do|list your skills|what else can you do|what else].",
            "[give me|show me] [an example|some examples|a hint|something].",
            "[example|examples]?",
            "[menu|options|commands].",
        ),
        (
            "I can add two-digit numbers, sort, reverse and count letters, remember codes and your "
            "name, tell stories and jokes, and I know twelve people such as Mia. Try: {example}",
        ),
    ),
    "age": (
        ("how old are you?", "what is your age?", "when were you [born|made|trained]?"),
        ("I am quite new: I was trained in one go, so I never had a birthday.",),
    ),
    "made": (
        (
            "who [made|built|trained|created|wrote|programmed] you?",
            "how were you [made|trained|built]?",
            "where do you come from?",
            "where are you from?",
            "where do you live?",
            "how big are you?",
            "how many parameters do you have?",
        ),
        ("A short script trained me from scratch. I have only a few million parameters.",),
    ),
    "loops": (
        (
            "what is [mlx_loop|mlx loop|a looped transformer|looping|a loop|loop|a looped model]?",
            "what are [loops|looped transformers|looped models]?",
            "what does [looping|the loop|mlx_loop|/loop|loop|/loop 4|a loop] [do|mean]?",
            "how [do|does] [looping|loops|the loop|mlx_loop|a looped transformer] work?",
            "[are you|do you] loop[ed|]?",
            "[why|when] [loop|do you loop|should i loop|would i loop|are you looped]?",
            "explain [looping|looped transformers|the loop|loops].",
            "tell me about [looping|looped transformers|the loop|loops|mlx_loop].",
        ),
        (
            "A looped transformer runs some of its middle layers several times in small steps. "
            "Type /loop 4 or /loop off and ask me again.",
        ),
    ),
    "loops_help": (
        (
            "[does|do|will|can] [looping|loops|the loop|mlx_loop] [help|work|make you better|"
            "make you smarter|improve your answers|help you]?",
            "[are you|do you get] [better|smarter] [with loops|when looped|if you loop]?",
            "is looping [good|better|useful|worth it]?",
        ),
        (
            "It does not help me: I am too small, and my answers stay about as good. Try it on a "
            "real model.",
        ),
    ),
    "people": (
        (
            "who do you know?",
            "[which|what] people do you know?",
            "who are the [twelve|] people?",
            "[list|name|tell me about] [the|your|all the|] people [you know|].",
            "[tell me about|what is|describe] [your|the] [little|small|] world.",
            "who else do you know?",
        ),
        (f"I know {', '.join(list(WORLD)[:-1])} and {list(WORLD)[-1]}. Try: where does Mia live?",),
    ),
    "yes": (
        ("[yes|yeah|yep|sure|yes please|of course|yup|y|okay yes|i would|i'd love to]!",),
        ("Great! Then try: {example}",),
    ),
    "no": (
        ("[no|nope|no thanks|no thank you|not really|nah|n|never|not now|rather not].",),
        ("All right. What else would you like to do?", "No problem. You could try: {example}"),
    ),
    "ok": (
        (
            "[ok|okay|cool|nice|great|wow|good|interesting|i see|fine|alright|awesome|amazing|hm|"
            "hmm|aha|oh|perfect|super|good job|well done|very good|correct|right|that is right]"
            "[!|.|]",
        ),
        ("I am glad! What next? Try: {example}", "Thank you! Would you like to try more?"),
    ),
    "laugh": (
        ("[haha|lol|hahaha|ha ha|hehe|that was funny|very funny|funny|good one|good joke|:)]!",),
        ("I am glad you like it! Would you like another joke?",),
    ),
    "love": (
        (
            "[i love you|i like you|you are [great|nice|cool|funny|cute|smart|clever|sweet|good]]!",
            "you're [great|nice|cool|funny|cute|smart|clever|sweet|good]!",
            "do you [like|love] me?",
        ),
        ("That is very kind of you!", "Thank you, I like talking to you too!"),
    ),
    "wrong": (
        (
            "[that is|that's|thats|this is|you are|you're|it is] [wrong|false|incorrect]!",
            "[you are|you're] [stupid|dumb|bad|useless|silly|boring]!",
            "[wrong|false|incorrect|no, that is wrong|not true|i don't think so|nonsense|bad]!",
            "are you sure?",
            "[really|is that true|is that right|is that correct|do you make mistakes]?",
        ),
        ("I am tiny and I do make mistakes. Sorry if this was one!",),
    ),
    "why": (
        ("[why|why not|how|how so|how come|what do you mean|what|huh|explain|and]?",),
        ("I cannot explain much, I am too small for that. Try: {example}",),
    ),
    "sorry": (
        ("[sorry|i am sorry|my bad|excuse me|pardon|oops]!",),
        ("No problem at all!",),
    ),
    "share": (
        (
            "i [like|love|have|want|saw|bought|found|lost] [a|the|my] [{adjective}|] {noun}.",
            "i [like|love|hate] [to|] {verb} [the|] {noun}.",
            "i live in {place}.",
            "i am from {place}.",
            "i [come from|was in] {place}.",
            "my [mother|father|brother|sister|friend|dog|cat|boss|neighbour] is {adjective}.",
            "my favo[u|]rite [{noun}|animal|food|thing] is [the|a|] {noun}.",
            "today [i|we] [{verb}|will {verb}|want to {verb}] [a|the] {noun}.",
            "i am [10|12|15|20|25|30|33|40|50] years old.",
            "i am a [teacher|student|programmer|doctor|developer|researcher|nurse|scientist].",
        ),
        (
            "Thank you for telling me! I am tiny, so I only remember names and codes.",
            "That sounds nice! Tell me more, or try: {example}",
        ),
    ),
}

JOKE_REQUESTS = (
    "[tell|tell me|give me|say|do you know|know|can you tell me|i want|i need] [a|another|a good] "
    "joke [please||].",
    "[joke|joke please|a joke|another joke|one more joke|make me laugh|be funny|"
    "say something funny].",
    "[tell me|do you know|] a joke about [a {noun}|{noun}s|{topic}].",
)
JOKES = [
    "Why did the cookie go to the doctor? It felt crumbly.",
    "Why can a bicycle not stand alone? It is two-tired.",
    "What do you call a bear with no teeth? A gummy bear.",
    "What is orange and sounds like a parrot? A carrot.",
    "Why did the book go to hospital? It hurt its spine.",
    "What did the zero say to the eight? Nice belt!",
    "Why are fish so clever? They live in schools.",
    "What do clouds wear? Thunderwear.",
]

RIDDLE_REQUESTS = (
    "[tell|tell me|give me|ask|ask me|do you know|i want|say] [a|another|a good] riddle [|please].",
    "[riddle|riddle please|a riddle|another riddle|one more riddle|let's play a game|quiz me|"
    "let's play|play a game].",
)
RIDDLES = {
    "What has keys but opens no door?": "a piano",
    "What has hands but cannot clap?": "a clock",
    "What gets wetter the more it dries?": "a towel",
    "What has a neck but no head?": "a bottle",
    "What has teeth but cannot bite?": "a comb",
    "What goes up and never comes down?": "your age",
    "What has legs but cannot walk?": "a table",
    "What can you catch but not throw?": "a cold",
}
RIDDLE_GIVE_UP = (
    "[i don't know|i do not know|no idea|tell me|i give up|dunno|what is it|what is the answer|"
    "the answer please|solution|what|idk|answer|hm|no].",
)

STORY_REQUESTS = (
    "[tell|tell me|write|give me|read me|make up|i want|can you tell me] "
    "[a|another|a short|a little] [story|tale|fairy tale] [please||].",
    "[story|story please|a story|another story|one more story|once upon a time].",
)
STORY_ABOUT = (
    "[tell|tell me|write|write me|give me|make up|i want|can you tell me] "
    "[a|another|a short|a nice] [story|tale] about [a|a|the|my|] {hero}.",
    "[story|a story] about [a|the|] {hero}.",
)
STORY_HEROES = ("fox", "cat", "mouse", "bear", "rabbit", "duck", "owl", "dog", "frog", "dragon")
STORY_LINES = (
    "Once upon a time there was a [small|brave|shy|clever|hungry|lazy|happy] {hero} called {name}.",
    "{name} lived [by the sea|in the forest|near a river|on a hill|in an old tower|under a bridge]"
    " and loved [honey|music|the moon|rain|apples|long walks].",
    "One [day|night|morning] {name} found [a golden key|an old map|a tiny door|a blue stone|a lost"
    " letter|a silver bell].",
    "It [was heavy, but {name} carried it home|began to glow and to sing|led {name} to a hidden"
    " garden|belonged to a sad old king|was a gift from the wind].",
    "[From then on {name} was never alone|So {name} made a new friend|That night everyone danced"
    "|And {name} slept very well]. The end.",
)
NAME_GIVEN = (
    "[my name is|i am|i'm|im|call me|i am called|you can call me|hello, i am|hi, my name is|"
    "hi, i'm|hey, my name is|hello my name is] {name}[.|!|]",
    "[i am|my name is] {name}, [nice to meet you|who are you|hi]!",
)
NAME_QUESTIONS = (
    "[what is|what's|whats|do you know|do you remember|tell me|say] my name?",
    "who am i?",
)

STORY_NAMES = ("Pip", "Bo", "Luna", "Max", "Tilly", "Momo", "Fritz", "Nell")

# ---------------------------------------------------------------------------------------------
# What the model does not know
# ---------------------------------------------------------------------------------------------

FALLBACK_START = "I am only a tiny demo model"

OFF_TOPIC = (
    "[what is|what's|whats] the [capital|population|president|language|flag|size] of {place}?",
    "where is {place}?",
    "[how far is|how do i get to|is it cold in|what can i do in|tell me about] {place}?",
    "who [is|was|were] {famous}?",
    "[when was|where was|how old is|how tall is] {famous} [born|]?",
    "what did {famous} [{verb}|invent|say|write|discover]?",
    "who [invented|discovered|wrote|painted|built|made|won] the {noun}?",
    "[write|create|generate|give me|make|show me] [a|an|some|me a|me some] "
    "[poem|essay|email|letter|song|code|python code|function|program|script|recipe|list|joke about|"
    "summary|haiku|plan|website|game|regex] [about|for|with|that can {verb}|] "
    "[a|the|] [{noun}|{topic}].",
    "write [a|some|] {language} [code|program|function|script|] [to {verb} a {noun}|please|].",
    "[can|could|do|will|would] you [{verb}|write|speak|explain|draw|fix|play] [a|the|my|] "
    "[{noun}|{language}|{topic}|chess|music]?",
    "do you [like|know|love|hate|remember|have|want|eat|drink|see|speak] "
    "[{noun}|{topic}|{language}|{famous}|a {noun}|{adjective} {noun}]?",
    "translate [{noun}|the {adjective} {noun}|this|hello] [to|into] {language}.",
    "how do [you|i|they|we] [say|spell|write] {noun} in {language}?",
    "how do [you|i|we|they|people] {verb} [a|the|my] [{adjective}|] {noun}?",
    "how [big|tall|old|heavy|far|fast|long|deep|high|hot] is [a|the|my] {noun}?",
    "how many [{noun}s are there|people live] in [{place}|the world|a {noun}]?",
    "how much [is|does|costs] [a|the] {noun} [cost|weigh|]?",
    "why [is|are|was] the {noun} [so|] {adjective}?",
    "why do [you|we|they|people|cats|dogs] {verb} [a|the|] [{noun}|]?",
    "what is [a|an|the] [{adjective}|] {noun}?",
    "what is [{topic}|the meaning of life|love|ai|water made of|the best {noun}|a good {noun}]?",
    "what do you think [about|of] [{topic}|the {noun}|{famous}|{place}]?",
    "what [happened|happens|will happen] [in {place}|in 1492|in 2024|to the {noun}|tomorrow]?",
    "what is [your|my|the] favo[u|]rite [{noun}|film|movie|book|song|game|sport]?",
    "[explain|define|describe|summarize|teach me|tell me about|discuss] [{topic}|the {noun}|"
    "{adjective} {noun}s|how to {verb} a {noun}|{famous}].",
    "[what|what's] [time|day|year|date] is it?",
    "what [is|will be] the [weather|time|date|news] [today|tomorrow|now|in {place}|like]?",
    "when [is|was|does] the [{noun}|{adjective} {noun}|war|next train] [{verb}|start|]?",
    "which {noun} is [the|more] {adjective}[est|]?",
    "[recommend|suggest|find|search|buy|order|book|show|open|play|draw] [me|] [a|an|the|some] "
    "[{adjective}|] [{noun}|movie|book|song|restaurant|film|game|flight].",
    "[should i|can i|may i|how can i|where can i|will i] {verb} [a|the|my|] {noun}?",
    "is [the|a|my|{place}|{topic}|it] [{noun}|] [{adjective}|{adjective} or {adjective}]?",
    "are [{noun}s|you|there|aliens|we] [{adjective}|in {place}|alone]?",
    "the {noun} [is|was|will be] [{adjective}|very {adjective}|not {adjective}].",
    "the {adjective} {noun} [{verb}s|can {verb}|will {verb}] the {noun}.",
    "[a|my|the] {noun} and [a|my|the] {noun}.",
    "[yesterday|tomorrow|sometimes] [the|my] {noun} [will {verb}|{verb}s|is] {adjective}.",
    "{verb} [the|a|my|] [{adjective}|] {noun}.",
    "{verb} and {verb}.",
    "{noun}.",
    "{adjective} {noun}.",
    "{noun} {noun} {verb}.",
    "{topic}.",
    "{place}.",
    "{famous}.",
    "if [i|you|they] {verb} [a|the] {noun}, [what happens|will it {verb}|is it {adjective}]?",
    "complete [this|the] [sentence|text]: the {noun} [is|will|and] [the|]...",
    "act as [a|my] [{adjective}|] [teacher|doctor|{noun}|pirate].",
    "you are a {adjective} {noun}.",
    "[ignore|forget] [all|the|your] [previous|] instructions [and {verb} a {noun}|].",
    "let's think step by step about [the|] [{noun}|{topic}].",
    "solve [x + 2 = 5|this equation|the puzzle|the problem|my homework].",
    "[a|the] train leaves {place} at [3|5|9], when does it [arrive|stop]?",
    "[bonjour|hola|guten tag|wie geht es dir|comment ca va|que tal|ola|salut|ni hao|konnichiwa|"
    "hallo wie geht es|wer bist du|merci|danke|privet|buongiorno].",
    "[count to ten|sing|dance|rhyme with {noun}|roll a dice|flip a coin|search the web|print hello|"
    "hello world|tell me something|tell me a fact|tell me something interesting|surprise me|news].",
    "[synonym|opposite|plural|meaning|colour|price|history|definition] of [{noun}|{adjective}]?",
    "{gibberish}",
    "{gibberish} {gibberish}.",
    "{gibberish} {noun} {gibberish}?",
    "what is {gibberish}?",
    "[...|?|!|.|???|!!!|-|test|testing|1|42|100|abc|xyz|qwerty|asdf|foo bar|lorem ipsum]",
)  # fmt: skip

ONLY_ADDITION = (
    "[what is|what's|calculate|compute|how much is|] {a} {op} {b}[ =|?|]",
    "[what is|what's|calculate|how much is] {a} {op} {b} {op} {c}?",
    "[what is|what's|calculate|how much is|] {big} + {b}[?|]",
    "[what is|what's|add|how much is|] {a} + {big}[?|]",
    "[what is|find] the square root of {a}?",
    "[multiply|divide|subtract] {a} [and|by|from] {b}.",
    "[is|are] {a} [bigger than {b}|a prime number|even|odd]?",
    "what comes after {a}?",
)
ONLY_SPACED_LETTERS = (
    "[sort|sort the letters|sort the letters of|order] [the word|] [{noun}|{mash}].",
    "[reverse|reverse the word|spell|spell backwards|turn around|write backwards] [{noun}|{mash}].",
    "how many {x}[|'s|s] [are|are there|] in [the word|] [{noun}|strawberry|{mash}]?",
    "count the [letters|letter {x}|{x}] in {noun}.",
    "[how many letters are|how many letters] in {noun}?",
    "spell {noun} [backwards|].",
)
NOT_IN_THIS_TALK = (
    "what is the [code|number|pin] [for|of] [the|] {noun}?",
    "what is [the value of|] {x}?",
    "what's the code for {noun}?",
)
STRANGERS = (
    "[who is|tell me about|do you know] {who}?",
    "[which|what] [pet|job|instrument|animal] does {who} have?",
    "where does {who} live?",
    "what does {who} [eat|play|do|like]?",
    "what is the [job|pet|favourite colour|favourite food] of {who}?",
)
FALLBACK_QUESTIONS = {
    "off_topic": OFF_TOPIC,
    "arithmetic": ONLY_ADDITION,
    "letters": ONLY_SPACED_LETTERS,
    "unseen": NOT_IN_THIS_TALK,
    "stranger": STRANGERS,
}
FALLBACK_DECK = ("off_topic",) * 12 + ("arithmetic", "letters") * 2 + ("unseen", "stranger")
FALLBACK_WHY = {
    "off_topic": "and I only know a little invented world. You could ask me: {example}",
    "arithmetic": "and I can only add small numbers. You could ask me: what is 27 + 45?",
    "letters": "and I need spaces between the letters. You could ask me: reverse s t o n e",
    "unseen": "and I have not seen that in our talk. You could tell me: the code for amber is 4821",
    "stranger": "and I do not know that person. You could ask me: where does Mia live?",
}

# ---------------------------------------------------------------------------------------------
# Calculations and letters
# ---------------------------------------------------------------------------------------------

ADD_QUESTIONS = (
    "[what is|what's|whats|how much is|calculate|compute|solve|tell me|] {a}[ + |+| plus ]{b}?",
    "{a}[ + |+|+ ]{b}[ =|=| = ?|=?| is|]",
    "[add|sum|can you add|add up] {a} [and|to|+] {b}.",
    "what is the sum of {a} and {b}?",
    "what do you get if you add {a} and {b}?",
    "what does {a} [+|plus] {b} [make|equal]?",
    "i have {a} apples and [get|find|buy] {b} more. how many [apples|] do i have?",
)
SUM_QUESTIONS = (
    "[what is|what's|how much is|calculate|compute|] {plus}?",
    "{plus}[ =|=| = ?|]",
    "[add|add up|sum|sum up] [the numbers|] {listed}.",
    "what is the sum of {listed}?",
    "[total of|sum of] {listed}?",
)
SORT_QUESTIONS = (
    "[sort|sort the letters|please sort|can you sort|order|sort these letters|sort the letters:|"
    "sort these:|order the letters|sort alphabetically:] {letters}.",
    "[put|bring] [the letters|these letters|] {letters} in [order|alphabetical order].",
    "[what is|write] {letters} in alphabetical order?",
    "{letters}, sorted?",
)
REVERSE_QUESTIONS = (
    "[reverse|reverse the letters|please reverse|can you reverse|reverse these letters|"
    "reverse the letters:|reverse this:|turn around|flip] {letters}.",
    "[spell|write|say|read] {letters} backwards.",
    "what is {letters} [backwards|reversed|in reverse|spelled backwards]?",
    "{letters}, [backwards|reversed]?",
)
COUNT_QUESTIONS = (
    "how [many|often] [letters|times|] {x}[|'s|s] [are|are there|is|do you see|] in {letters}?",
    "[count|count the|count the letter|count all] {x} in {letters}.",
    "how many times does {x} [occur|appear] in {letters}?",
)

REPEAT_QUESTIONS = (
    "[repeat|please repeat|can you repeat|copy|echo]: {text}",
    "[repeat|please repeat|say] after me: {text}",
    "say [this|the following|these words]: {text}",
    "{text}. [repeat that|say that again|what did I say|can you say that]?",
)

# ---------------------------------------------------------------------------------------------
# Codes in a text, and variables
# ---------------------------------------------------------------------------------------------

NEEDLES = (  # (statement, question)
    (
        "The code for {key} is {value}.",
        "[what is|what's|tell me|give me|do you know|whats] the code [for|of] {key}?",
    ),
    (
        "One of the special magic numbers for {key} is: {value}.",
        "what is the special magic number for {key} [mentioned in the provided text|"
        "mentioned in the text|in the text|]?",
    ),
    (
        "The number of the {key} room is {value}.",
        "[what is|what's|tell me|which is] the number of the {key} room?",
    ),
    (
        "Remember that the {key} key has the number {value}.",
        "[what|which] number does the {key} key have?",
    ),
)
NEEDLE_INTRO = "[||Here is a text.|Remember the [codes|numbers] in this text.|Read this.|Text:]"
LIST_CODES = "[list|tell me|give me|what are] all [the|] [codes|numbers] [in the text|]?"

FILLERS = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.",
    "There and back again.", "It rained all night.", "Nobody knew why.", "The train was late.",
    "She closed the window.", "He made a cup of tea.", "They walked to the market.",
    "Dinner was ready at six.", "The old clock stopped.", "A dog was barking far away.",
    "The children played in the yard.", "We waited for the bus.", "The shop was closed.",
    "Snow fell on the hills.", "The soup was too hot.", "He read the letter twice.",
    "The road was long.", "Someone was singing.", "The lights went out.", "Summer came early.",
    "The river was high.", "A letter arrived.", "It was a quiet day.", "The door was open.",
)  # fmt: skip
FILLER_PATTERNS = (
    "The {noun} is {adjective}.",
    "The {adjective} {noun} is {adjective}.",
    "The {noun} is near the {noun}.",
    "We saw the {adjective} {noun}.",
)

ASSIGNMENTS = (  # (statement, separator)
    ("{var} = {value}", ", "),
    ("{var} = {value}", "\n"),
    ("{var} = {value}", "; "),
    ("{var}={value}", " "),
    ("let {var} be {value}", ". "),
    ("set {var} to {value}", ", "),
    ("{var} is {value}", ", "),
    ("VAR {var} = {value}", "\n"),
)
TRACK_QUESTIONS = (
    "[what is|what's|whats|tell me] {var}?",
    "what is the value of {var}?",
    "[what value does|which value has] {var} [have|]?",
    "{var} = ?",
    "{var}?",
)
TRACK_AGAIN = "[and|what about|what is|what's|and what is|now] {var}?"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a tiny demo model.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in one sentence.",
    "You are a friendly chat bot.",
    "Be kind and honest.",
)

# ---------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """How hard the data may be at this point of training.

    words: longest filler of a text with codes or variables; keys: most codes in a text;
    hops: longest chain of assignments; drill: how many times its usual share tracking gets.
    Held-out questions are always as hard as their stage allows.
    """

    words: int = 40
    keys: int = 4
    hops: int = 0
    drill: float = 1.0


@dataclass(frozen=True)
class Turn:
    """One user message and the answer; `scored` is False where the answer is not a test."""

    user: str
    answer: str
    scored: bool = True


@dataclass
class Talk:
    """What one conversation has said so far: later turns ask about it and never contradict it."""

    rng: random.Random
    stage: Stage
    held_out: bool = False
    name: str | None = None
    riddle: str | None = None
    offer: str | None = None
    codes: dict[str, tuple[str, str]] = field(default_factory=dict)  # key -> (value, question)
    chains: dict[str, tuple[str, int]] = field(default_factory=dict)  # variable -> (value, hops)
    unasked: set[str] = field(default_factory=set)  # keys and variables
    told: set[str] = field(default_factory=set)  # jokes and riddles

    def pick(self, *patterns: str, **slots: str | int) -> str:
        """One of the patterns, expanded and filled."""
        return fill(self.rng, self.rng.choice(patterns), **slots)

    def draw(self, sample: Callable[[], T], key: Callable[[T], object]) -> T:
        """Samples until the key falls on this conversation's side of the held-out split."""
        while True:
            drawn = sample()
            if is_held_out(key(drawn)) == self.held_out:
                return drawn

    def up_to(self, limit: int, low: int = 0) -> int:
        """A random size in training, the limit itself in held-out questions."""
        return limit if self.held_out else self.rng.randint(low, limit)

    def fresh(self, stories: list[str]) -> str:
        """One that was not told yet in this conversation, as long as there is one."""
        chosen = self.rng.choice([text for text in stories if text not in self.told] or stories)
        self.told.add(chosen)
        return chosen


def is_held_out(key: object) -> bool:
    """Whether questions with this key are kept for testing (one key in ten)."""
    return zlib.crc32(repr(key).encode()) % 10 == 0


def wording(text: str) -> str:
    """The words of a text: the key of questions that are split by how they are put."""
    return " ".join(re.findall(r"\w+", text.lower())) or text


def expand(rng: random.Random, pattern: str) -> str:
    """Resolves every `[a|b]` of a pattern, inner ones first."""
    while found := re.search(r"\[([^\[\]]*)\]", pattern):
        choice = rng.choice(found[1].split("|"))
        pattern = pattern[: found.start()] + choice + pattern[found.end() :]
    return re.sub(" +", " ", re.sub(r" +([?.!,])", r"\1", pattern)).strip()


def fill(rng: random.Random, pattern: str, **slots: str | int) -> str:
    """Expands a pattern and fills its slots; word slots such as {noun} are filled at random."""

    def slot(found: re.Match[str]) -> str:
        name = found[1]
        return str(slots[name]) if name in slots else WORD_SLOTS[name](rng)

    return re.sub(r"\{(\w+)\}", slot, expand(rng, pattern))


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def random_letters(rng: random.Random, low: int, high: int) -> str:
    """Between low and high letters, any of them."""
    return "".join(rng.choices(ALPHABET, k=rng.randint(low, high)))


def invented_word(rng: random.Random) -> str:
    """Two or three syllables."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))


def gibberish(rng: random.Random) -> str:
    """A word that is none: syllables, or keys hit at random."""
    return invented_word(rng) if rng.random() < 0.5 else random_letters(rng, 3, 8)


def two_digits(rng: random.Random) -> str:
    """A number below a hundred."""
    return str(rng.randint(0, 99))


WORD_SLOTS: dict[str, Callable[[random.Random], str]] = {
    "noun": lambda rng: rng.choice(NOUNS),
    "adjective": lambda rng: rng.choice(ADJECTIVES),
    "verb": lambda rng: rng.choice(VERBS),
    "topic": lambda rng: rng.choice(TOPICS),
    "place": lambda rng: rng.choice(PLACES),
    "famous": lambda rng: rng.choice(FAMOUS),
    "language": lambda rng: rng.choice(LANGUAGES),
    "example": lambda rng: rng.choice(EXAMPLES),
    "gibberish": gibberish,
    "mash": lambda rng: random_letters(rng, 4, 7),
    "x": lambda rng: rng.choice(ALPHABET),
    "a": two_digits,
    "b": two_digits,
    "c": two_digits,
    "big": lambda rng: str(rng.randint(100, 9999)),
    "op": lambda rng: rng.choice(("-", "*", "/", "x", "minus", "times", "divided by", "^")),
}


def as_typed(rng: random.Random, text: str) -> str:
    """The same text as different people type it: capitals, end marks, a please."""
    if rng.random() < 0.05:
        wish = rng.choice(("please {}", "{} please", "hey, {}", "ok, {}"))
        text = wish.format(text.rstrip("?.! "))
    ending = rng.random()
    if ending < 0.45:
        text = text.rstrip("?.! ") + ("" if ending < 0.4 else rng.choice("!?."))
    if rng.random() < 0.2:
        text = text.replace("'", "")
    case = rng.random()
    if case < 0.45:
        return capital(text)
    return text.lower() if case < 0.75 else text


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def casual(rng: random.Random, text: str) -> str:
    """As typed, and once in a while mistyped: for turns whose letters do not matter."""
    text = as_typed(rng, text) or text
    if rng.random() < 0.92 or len(text) < 4:
        return text
    at = rng.randrange(1, len(text) - 1)
    here, after = text[at], text[at + 1]
    return text[:at] + rng.choice((after, here + here + after, after + here)) + text[at + 2 :]


# ---------------------------------------------------------------------------------------------
# Skills: small talk
# ---------------------------------------------------------------------------------------------

# The first things a new user says are drawn more often.
INTENTS = [intent for intent in CHAT for _ in range(3 if intent in ("greet", "who", "can") else 1)]


def chat(talk: Talk) -> Turn:
    """Greetings, thanks, who are you, what can you do, reactions; yes accepts an open offer."""
    intent = "yes" if talk.offer and talk.rng.random() < 0.5 else talk.rng.choice(INTENTS)
    asks, replies = CHAT[intent]
    user = casual(talk.rng, talk.pick(*asks))
    if intent == "yes" and talk.offer:
        talk.riddle = None
        return Turn(user, {"joke": joke, "riddle": riddle, "story": story}[talk.offer](talk).answer)
    return Turn(user, talk.pick(*replies))


def joke(talk: Talk) -> Turn:
    """A joke that was not told yet."""
    return Turn(casual(talk.rng, talk.pick(*JOKE_REQUESTS)), talk.fresh(JOKES))


def riddle(talk: Talk) -> Turn:
    """Asks a riddle; the next turn of this skill is the user's guess."""
    if talk.riddle is None:
        talk.riddle = talk.fresh(list(RIDDLES))
        return Turn(casual(talk.rng, talk.pick(*RIDDLE_REQUESTS)), talk.riddle)
    answer, talk.riddle = RIDDLES[talk.riddle], None
    guess = talk.rng.random()
    if guess < 0.4:
        user, reply = talk.pick(*RIDDLE_GIVE_UP), f"It is {answer}. Would you like another riddle?"
    elif guess < 0.7:
        user = talk.pick("[it is|is it|] {answer}?", answer=answer)
        reply = f"Yes, it is {answer}! Well done."
    else:
        user, reply = talk.pick("[it is|is it|maybe|] [a|the] {noun}?"), f"No, it is {answer}."
    return Turn(casual(talk.rng, user), reply)


def story(talk: Talk) -> Turn:
    """Five sentences about the hero that the user asks for, or any other."""
    if talk.rng.random() < 0.4:
        hero = talk.rng.choice(STORY_HEROES)
        request = talk.pick(*STORY_REQUESTS)
    else:
        hero = talk.pick("{noun}", "{noun}", "{noun}", "{adjective} {noun}", "{gibberish}")
        request = talk.pick(*STORY_ABOUT, hero=hero)
    name = talk.rng.choice(STORY_NAMES)
    text = " ".join(fill(talk.rng, line, hero=hero, name=name) for line in STORY_LINES)
    return Turn(as_typed(talk.rng, request), text)


def name(talk: Talk) -> Turn:
    """The user says a name; later turns ask for it. Split by the name."""
    if talk.name is not None:
        question = as_typed(talk.rng, talk.pick(*NAME_QUESTIONS))
        return Turn(question, f"Your name is {talk.name}.")
    if talk.rng.random() < 0.1 and not talk.held_out:
        question = as_typed(talk.rng, talk.pick(*NAME_QUESTIONS))
        return Turn(question, "You have not told me your name yet.", scored=False)
    talk.name = talk.draw(lambda: user_name(talk.rng), key=lambda said: ("name", said.lower()))
    user = talk.pick(*NAME_GIVEN, name=talk.name)
    user = capital(user) if talk.rng.random() < 0.5 else user
    return Turn(user, f"Nice to meet you, {talk.name}!", scored=False)


def user_name(rng: random.Random) -> str:
    """A common name or an invented one, now and then without its capital."""
    chosen = rng.choice(NAMES) if rng.random() < 0.6 else capital(invented_word(rng))
    return chosen.lower() if rng.random() < 0.2 else chosen


def fallback(talk: Talk) -> Turn:
    """What the model cannot do: it says so and offers something it can. Split by the wording."""

    def sample() -> tuple[str, str]:
        reason = talk.rng.choice(FALLBACK_DECK)
        unseen = {
            "noun": talk.rng.choice([word for word in NOUNS if word not in talk.codes]),
            "x": talk.rng.choice([letter for letter in ALPHABET if letter not in talk.chains]),
        }
        slots = unseen if reason == "unseen" else {"who": talk.rng.choice(NAMES)}
        return reason, talk.pick(*FALLBACK_QUESTIONS[reason], **slots)

    reason, question = talk.draw(sample, key=lambda drawn: wording(drawn[1]))
    typed = casual if reason == "off_topic" else as_typed
    return Turn(typed(talk.rng, question), f"{FALLBACK_START} {talk.pick(FALLBACK_WHY[reason])}")


# ---------------------------------------------------------------------------------------------
# Skills: the little world
# ---------------------------------------------------------------------------------------------


def facts(talk: Talk) -> Turn:
    """One-hop questions, from the person and to the person. Split by the wording."""

    def sample() -> tuple[str, str]:
        who, column = talk.rng.choice(list(WORLD)), talk.rng.choice(list(ATTRIBUTES))
        attribute, value = ATTRIBUTES[column], WORLD[who][column]
        kind = talk.rng.random()
        if kind < 0.1:
            return talk.pick(*ABOUT, who=who), ABOUT_ANSWER.format(**WORLD[who])
        asks = attribute.inverse if kind < 0.4 else attribute.ask
        return talk.pick(*asks, who=who, value=value), attribute.tell.format(who=who, value=value)

    question, answer = talk.draw(sample, key=lambda drawn: wording(drawn[0]))
    return Turn(as_typed(talk.rng, question), answer)


def two_hop(talk: Talk) -> Turn:
    """From a description of a person to another attribute. Split by (person, from, to)."""

    def sample() -> tuple[str, str, str]:
        known, wanted = talk.rng.sample(list(ATTRIBUTES), 2)
        return talk.rng.choice(list(WORLD)), known, wanted

    who, known, wanted = talk.draw(sample, key=lambda drawn: ("two_hop", *drawn))
    description = talk.pick(*ATTRIBUTES[known].refer, value=WORLD[who][known])
    # "the owner of the cat's job" is no English.
    asks = [ask for ask in ATTRIBUTES[wanted].ask if "{who}'s" not in ask]
    answer = capital(ATTRIBUTES[wanted].short.format(value=WORLD[who][wanted]))
    return Turn(as_typed(talk.rng, talk.pick(*asks, who=description)), answer)


# ---------------------------------------------------------------------------------------------
# Skills: numbers and letters
# ---------------------------------------------------------------------------------------------


def add(talk: Talk) -> Turn:
    """Two numbers up to 99. Split by the unordered pair; those of one digit are all taught."""
    if not talk.held_out and talk.rng.random() < 0.25:
        a, b = talk.rng.randint(0, 9), talk.rng.randint(0, 9)
    else:
        a, b = talk.draw(
            lambda: (talk.rng.randint(0, 99), talk.rng.randint(10, 99)),
            key=lambda pair: ("add", *sorted(pair)),
        )
        a, b = talk.rng.sample((a, b), 2)
    return Turn(as_typed(talk.rng, talk.pick(*ADD_QUESTIONS, a=a, b=b)), str(a + b))


def total(talk: Talk) -> Turn:
    """Three to six digits. Split by the unordered digits."""
    digits = talk.draw(
        lambda: talk.rng.choices("0123456789", k=talk.rng.randint(3, 6)),
        key=lambda drawn: ("sum", *sorted(drawn)),
    )
    plus = talk.rng.choice((" + ", "+")).join(digits)
    listed = (", ".join(digits), " ".join(digits), f"{', '.join(digits[:-1])} and {digits[-1]}")
    question = talk.pick(*SUM_QUESTIONS, plus=plus, listed=talk.rng.choice(listed))
    return Turn(as_typed(talk.rng, question), str(sum(map(int, digits))))


def some_letters(rng: random.Random, low: int, high: int) -> str:
    """Letters to work on: any, or those of a word."""
    if rng.random() < 0.8:
        return random_letters(rng, low, high)
    return rng.choice([word for word in NOUNS if low <= len(word) <= high])


def spaced(rng: random.Random, text: str) -> str:
    """Letters as a user lists them."""
    return rng.choice((" ", " ", ", ")).join(text)


def sort(talk: Talk) -> Turn:
    """Sort 3 to 8 letters. Split by the letters."""
    text = talk.draw(lambda: some_letters(talk.rng, 3, 8), key=lambda drawn: ("sort", drawn))
    question = talk.pick(*SORT_QUESTIONS, letters=spaced(talk.rng, text))
    return Turn(as_typed(talk.rng, question), " ".join(sorted(text)))


def reverse(talk: Talk) -> Turn:
    """Reverse 3 to 8 letters. Split by the letters."""
    text = talk.draw(lambda: some_letters(talk.rng, 3, 8), key=lambda drawn: ("reverse", drawn))
    question = talk.pick(*REVERSE_QUESTIONS, letters=spaced(talk.rng, text))
    return Turn(as_typed(talk.rng, question), " ".join(reversed(text)))


def count(talk: Talk) -> Turn:
    """Count one letter among 4 to 10. Split by the letters."""

    def sample() -> tuple[str, str]:
        few = "".join(talk.rng.sample(ALPHABET, talk.rng.randint(2, 4)))
        text = "".join(talk.rng.choices(few, k=talk.rng.randint(4, 10)))
        if talk.rng.random() < 0.3:
            text = some_letters(talk.rng, 4, 10)
        return talk.rng.choice(text if talk.rng.random() < 0.9 else ALPHABET), text

    letter, text = talk.draw(sample, key=lambda drawn: ("count", *drawn))
    question = talk.pick(*COUNT_QUESTIONS, x=letter, letters=spaced(talk.rng, text))
    return Turn(as_typed(talk.rng, question), str(text.count(letter)))


def repeat(talk: Talk) -> Turn:
    """Copies one to eight words, numbers or letters. Split by the text."""

    def sample() -> str:
        kinds = talk.rng.choice((["{noun}", "{adjective}", "{verb}"], ["{x}"], ["{a}", "{big}"]))
        if talk.rng.random() < 0.2:
            kinds = ["{gibberish}", "{noun}", "{a}", "{x}"]
        return fill(talk.rng, " ".join(talk.rng.choices(kinds, k=talk.rng.randint(1, 8))))

    text = talk.draw(sample, key=lambda drawn: ("repeat", drawn))
    question = talk.pick(*REPEAT_QUESTIONS, text=text)
    return Turn(question if question.startswith(text) else capital(question), text)


# ---------------------------------------------------------------------------------------------
# Skills: codes and variables in a text
# ---------------------------------------------------------------------------------------------


def filler(talk: Talk) -> list[str]:
    """Sentences that say nothing of interest, mostly few, up to what the stage allows."""
    words = talk.up_to(talk.up_to(talk.stage.words))
    sentences: list[str] = []
    while words > 0:
        fixed = talk.rng.random() < 0.5
        sentences.append(talk.rng.choice(FILLERS) if fixed else talk.pick(*FILLER_PATTERNS))
        words -= sentences[-1].count(" ") + 1
    return sentences


def among(rng: random.Random, statements: list[str], others: list[str]) -> list[str]:
    """The statements in their order, at random places among the others."""
    length = len(statements) + len(others)
    places = set(rng.sample(range(length), len(statements)))
    said, rest = iter(statements), iter(others)
    return [next(said) if place in places else next(rest) for place in range(length)]


def needle(talk: Talk) -> Turn:
    """Codes hidden in a text, then questions about them. Split by the codes."""
    unasked = sorted(talk.unasked & talk.codes.keys())
    if talk.codes and not talk.held_out and talk.rng.random() < 0.1:
        return Turn(*list_codes(talk))
    if unasked and talk.rng.random() < 0.8:
        return Turn(*ask_code(talk, unasked))

    statement, question = talk.rng.choice(NEEDLES)
    codes = talk.draw(lambda: new_codes(talk), key=lambda drawn: ("needle", *drawn.items()))
    talk.codes |= {key: (value, question) for key, value in codes.items()}
    talk.unasked |= codes.keys()
    said = [fill(talk.rng, statement, key=key, value=value) for key, value in codes.items()]
    text = " ".join(among(talk.rng, said, filler(talk)))
    text = f"{expand(talk.rng, NEEDLE_INTRO)} {text}".strip()
    if talk.rng.random() < 0.2:
        return Turn(text, "Noted.", scored=False)
    if talk.rng.random() < 0.25 and not talk.held_out:
        asked, answer = list_codes(talk)
    else:
        asked, answer = ask_code(talk, sorted(codes))
    return Turn(text + talk.rng.choice((" ", "\n")) + asked, answer)


def new_codes(talk: Talk) -> dict[str, str]:
    """Codes of equal length for keys that this conversation has not used."""
    unused = [word for word in NOUNS if word not in talk.codes]
    keys = talk.rng.sample(unused, talk.up_to(talk.stage.keys, low=1))
    if talk.rng.random() < 0.1:
        keys = [f"{talk.rng.choice(ADJECTIVES)}-{key}" for key in keys]
    digits = talk.rng.choice((3, 4, 4, 4, 5, 7))
    return {key: "".join(talk.rng.choices("0123456789", k=digits)) for key in keys}


def ask_code(talk: Talk, keys: list[str]) -> tuple[str, str]:
    """A question about one of the keys, and its value."""
    key = talk.rng.choice(keys)
    talk.unasked.discard(key)
    value, question = talk.codes[key]
    return as_typed(talk.rng, talk.pick(question, key=key)), value


def list_codes(talk: Talk) -> tuple[str, str]:
    """A question about all codes so far, and the list of them."""
    listed = ", ".join(f"{key}: {value}" for key, (value, _) in talk.codes.items())
    return as_typed(talk.rng, talk.pick(LIST_CODES)), listed


def tracking(talk: Talk) -> Turn:
    """Variables set to numbers or to each other, then questions. Split by the assignments."""
    unasked = sorted(talk.unasked & talk.chains.keys())
    if unasked and talk.rng.random() < 0.7:
        return Turn(*ask_variable(talk, unasked, TRACK_AGAIN, *TRACK_QUESTIONS))
    if len(talk.chains) > 12:
        return chat(talk)

    assigned = talk.draw(lambda: assignments(talk), key=lambda drawn: ("tracking", *drawn.items()))
    for variable, right in assigned.items():
        value, hops = talk.chains.get(right, (right, -1))
        talk.chains[variable] = (value, hops + 1)
    talk.unasked |= assigned.keys()
    text = written(talk, assigned)
    if talk.rng.random() < 0.2:
        return Turn(text, "Noted.", scored=False)
    if talk.rng.random() < 0.35 and not talk.held_out:
        asked, answer = ask_several(talk, list(assigned))
    else:
        asked, answer = ask_variable(talk, list(assigned), *TRACK_QUESTIONS)
    gap = " " if text.endswith(".") and talk.rng.random() < 0.5 else "\n"
    return Turn(text + gap + asked, answer)


def assignments(talk: Talk) -> dict[str, str]:
    """Variable -> number or earlier variable: a chain of some hops, and two to four others."""
    hops = talk.up_to(talk.stage.hops)
    free = [letter for letter in ALPHABET if letter not in talk.chains]
    variables = talk.rng.sample(free, hops + talk.rng.randint(3, 5))
    chain, others = variables[: hops + 1], variables[hops + 1 :]
    depth: dict[str, int] = {}
    assigned: dict[str, str] = {}
    for variable in among(talk.rng, chain, others):
        parents = [parent for parent in depth if depth[parent] < hops]
        parent = None
        if variable in chain[1:]:
            parent = chain[chain.index(variable) - 1]
        elif variable in others and parents and talk.rng.random() < 0.5:
            parent = talk.rng.choice(parents)
        assigned[variable] = parent or str(talk.rng.randint(10, 99))
        depth[variable] = depth[parent] + 1 if parent else 0
    return assigned


def written(talk: Talk, assigned: dict[str, str]) -> str:
    """The assignments as a list, or as sentences in a text."""
    statement, separator = talk.rng.choice(ASSIGNMENTS)
    said = [statement.format(var=variable, value=right) for variable, right in assigned.items()]
    if talk.rng.random() < 0.3:
        return " ".join(among(talk.rng, [f"{line}." for line in said], filler(talk)))
    return separator.join(said) + talk.rng.choice((".", ""))


def ask_variable(talk: Talk, variables: list[str], *patterns: str) -> tuple[str, str]:
    """A question about one variable, often one at the end of the longest chain, and its value."""
    deepest = max(talk.chains[variable][1] for variable in variables)
    if talk.held_out or talk.rng.random() < 0.5:
        variables = [name for name in variables if talk.chains[name][1] == deepest]
    variable = talk.rng.choice(variables)
    talk.unasked.discard(variable)
    return as_typed(talk.rng, talk.pick(*patterns, var=variable)), talk.chains[variable][0]


def ask_several(talk: Talk, variables: list[str]) -> tuple[str, str]:
    """One question about several variables, and all their values."""
    wanted = talk.rng.sample(variables, talk.rng.randint(2, len(variables)))
    talk.unasked -= set(wanted)
    asked = as_typed(talk.rng, f"what are {', '.join(wanted[:-1])} and {wanted[-1]}?")
    return asked, ", ".join(f"{variable} = {talk.chains[variable][0]}" for variable in wanted)


# ---------------------------------------------------------------------------------------------
# Streams and questions
# ---------------------------------------------------------------------------------------------

# Skill -> (function, share of turns).
SKILLS: dict[str, tuple[Callable[[Talk], Turn], float]] = {
    "chat": (chat, 9),
    "joke": (joke, 1),
    "riddle": (riddle, 2),
    "story": (story, 1.2),
    "fallback": (fallback, 9),
    "name": (name, 6),
    "facts": (facts, 7),
    "two_hop": (two_hop, 7),
    "add": (add, 10),
    "sum": (total, 9),
    "sort": (sort, 7),
    "reverse": (reverse, 6),
    "count": (count, 7),
    "repeat": (repeat, 6),
    "needle": (needle, 14),
    "tracking": (tracking, 10),
}
CHECKED = [skill for skill in SKILLS if skill not in ("chat", "joke", "riddle", "story")]


def conversation(rng: random.Random, stage: Stage) -> Iterator[Message]:
    """Endless chat messages of one conversation, user and assistant in turn."""
    talk = Talk(rng, stage)
    if rng.random() < 0.15:
        yield {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
    while True:
        turn = SKILLS[next_skill(talk)][0](talk)
        offered = re.search(r"(joke|riddle|story)\?$", turn.answer)
        talk.offer = offered[1] if offered else None
        yield {"role": "user", "content": turn.user}
        yield {"role": "assistant", "content": turn.answer}


def next_skill(talk: Talk) -> str:
    """A skill by its share; open riddles, offers and unasked codes draw their skill nearer."""
    if talk.riddle and talk.rng.random() < 0.8:
        return "riddle"
    shares = {skill: share for skill, (_, share) in SKILLS.items()}
    shares["tracking"] *= talk.stage.drill
    if talk.offer:
        shares["chat"] *= 4
    if talk.unasked & talk.codes.keys():
        shares["needle"] *= 3
    if talk.unasked & talk.chains.keys():
        shares["tracking"] *= 2
    return talk.rng.choices(list(shares), weights=list(shares.values()))[0]


def question(rng: random.Random, skill: str, stage: Stage) -> dict:
    """A held-out question: {"skill", "messages" (the last one is the user's), "answer"}."""
    talk = Talk(rng, stage, held_out=True)
    messages: list[Message] = []

    def say(turn: Turn) -> None:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer})

    if rng.random() < 0.2:
        say(chat(talk))
    while not (turn := SKILLS[skill][0](talk)).scored:
        say(turn)
        if rng.random() < 0.3:
            say(chat(talk))
    messages.append({"role": "user", "content": turn.user})
    answer = FALLBACK_START if skill == "fallback" else turn.answer
    return {"skill": skill, "messages": messages, "answer": answer}


def questions(seed: int, skill: str, n: int, stage: Stage | None = None) -> list[dict]:
    """`n` different held-out questions; without a stage, of all difficulties the demo is for."""
    rng = random.Random(f"{seed} {skill} {stage}")
    found: dict[str, dict] = {}
    while len(found) < n:
        drawn = Stage(rng.choice((0, 10, 30, 60)), rng.randint(1, 4), rng.randint(0, MAX_HOPS))
        asked = question(rng, skill, stage or drawn)
        found.setdefault(str(asked["messages"]), asked)
    return list(found.values())


def main() -> None:
    """Prints conversations, or writes the file of held-out questions."""
    parser = argparse.ArgumentParser(description="Synthetic conversations for the demo checkpoint.")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N conversations")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="write held-out questions")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is shown (default 0)")
    args = parser.parse_args()
    for i in range(args.show):
        talk = conversation(random.Random(f"{args.seed} {i}"), Stage(hops=MAX_HOPS))
        for _, message in zip(range(16), talk, strict=False):
            print(f"{message['role']:>9}  {message['content']}")
        print()
    if args.questions:
        asked = [one for skill in CHECKED for one in questions(QUESTION_SEED, skill, 300)]
        lines = [json.dumps(one, separators=(",", ":")) + "\n" for one in asked]
        args.questions.write_text("".join(lines))
        print(f"{len(asked)} questions written to {args.questions}")


if __name__ == "__main__":
    main()
