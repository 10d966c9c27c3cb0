"""Synthetic conversations for the demo checkpoint: small talk, a little world, and checkable skills.

Everything is drawn from a seeded `random.Random`, so a seed fixes the data. Data (word lists,
phrasings, the world) come first, code after them. A *skill* is a function from a `Talk` (the state
of one conversation) to a `Turn` (one question and its answer).

Phrasings use a small pattern language: `[a|b|]` picks one alternative, `{slot}` is filled in later.

Held-out questions: every question has a key (the numbers to add, the letters to sort, the wording
of a question about the world, ...). A checksum of the key puts one key in ten on the held-out side;
training never draws from there and `questions.jsonl` is drawn from nowhere else.

    python scripts/demo_data.py --show 3                  print three conversations
    python scripts/demo_data.py --questions FILE          write the held-out questions
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

# ---------------------------------------------------------------------------------------------
# Data: words
# ---------------------------------------------------------------------------------------------

NOUNS = """
apple arrow ball banana bank barrel basket beach bear bell bicycle bird blanket boat book bottle box
branch bread bridge brush bucket bus butter button cactus cake camel camera candle car card carpet
castle cave chain chair cheese cherry chicken church circle clock cloud coat coffee coin comet
computer cow crown cup curtain desert desk diamond dolphin donkey door dragon dress drum duck eagle
ear earth egg elephant engine eye farm feather fence field finger fire fish flag flower fly football
forest fork fox frog fruit garden gate ghost giant giraffe glass glove goat grass guitar hammer
hand hat heart hedgehog hill hole honey horse hospital hotel house ice island jacket jar juice key
king kitchen kite knife knight ladder lake lamp leaf lemon letter library lion lizard lock machine
map market meadow milk mirror money monkey moon moss mountain mouse mushroom music needle nest
ocean office onion orange owl paint palace panda paper park peach pebble pen pencil penguin phone
picture pig pillow pirate pizza planet plant plate pocket pond potato princess queen rabbit radio
rain ring river road robot rock roof room rope rose sand school scissors sea shadow shark sheep
shell ship shirt shoe shop silk sky snail snake snow sock song soup spider spoon spring star
station stone storm street sugar summer sun swan sword table tea teacher tent theatre ticket tiger
tiger tomato tower town toy train tree tunnel turtle umbrella valley village violin volcano wagon
wall watch water wave whale wheel wind window winter witch wizard wolf wood wool worm zebra
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

TOPICS = """
algebra art astronomy baseball basketball biology black holes chemistry chess climate change
cooking cryptography dinosaurs economics electricity evolution fashion football gravity geography
history jazz law literature logic machine learning magnetism mathematics medicine mythology
neural networks nuclear power philosophy photography photosynthesis physics poetry politics
programming psychology quantum physics relativity religion robotics space travel sports tennis
thermodynamics time travel
"""
TOPICS = re.findall(
    r"black holes|climate change|machine learning|neural networks|nuclear power|quantum physics|"
    r"space travel|time travel|\w+",
    TOPICS,
)
