"""RULER's tasks: structure, size and metrics of the published configuration."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from mlx_loop import UserError
from mlx_loop.measure.tasks import ruler
from mlx_loop.measure.tasks.ruler import DEPTHS, NOISE, TASKS, Sources, example, score, sentences

NEEDLE = re.compile(r"Remember that the (\S+) key has the (number|identifier) (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def size(prompt, prefix):
    """Tokens as a tokenizer might count them: pieces of up to four letters, and each other sign."""
    return len(re.findall(r"\w{1,4}|[^\w\s]", f"{prompt} {prefix}"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A file of questions about documents."""
    path = tmp_path_factory.mktemp("qa") / "questions.jsonl"
    lines = [
        {
            "question": f"Who keeps the key of room {i}?",
            "answers": [f"Warden {i}", f"the warden of room {i}"],
            "documents": [f"Room {i} has a door. " + f"Its key is with Warden {i}. " * 30],
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(task, length, index=0, documents=None, seed=ruler.SEED):
    return example(task, length, index, size, Sources(documents=documents), seed)


@pytest.mark.parametrize("length", [1024, 4096, 10_000])
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_length_to_within_two_per_cent(task, length, documents):
    for index in range(2):
        made = make(task, length, index, documents)
        assert made.tokens == size(made.prompt, made.answer_prefix)
        assert 0.98 * length <= made.tokens + TASKS[task].max_tokens <= length


@pytest.mark.parametrize(
    ("task", "keys", "values", "queries", "key_is_uuid", "value_is_uuid"),
    [
        ("niah_single_1", 1, 1, 1, False, False),
        ("niah_single_2", 1, 1, 1, False, False),
        ("niah_single_3", 1, 1, 1, False, True),
        ("niah_multikey_1", 4, 1, 1, False, False),
        ("niah_multikey_2", None, 1, 1, False, False),
        ("niah_multikey_3", None, 1, 1, True, True),
        ("niah_multivalue", 1, 4, 1, False, False),
        ("niah_multiquery", 4, 1, 4, False, False),
    ],
)
def test_needles_are_as_published(task, keys, values, queries, key_is_uuid, value_is_uuid):
    for index in range(5):
        made = make(task, 2048, index)
        text, question = made.prompt.rsplit("\n", 1)
        found = [(key, value) for key, _, value in NEEDLE.findall(text)]
        by_key = {}
        for key, value in found:
            by_key.setdefault(key, []).append(value)
        # Where the haystack is made of needles, every sentence but the last is one.
        assert len(by_key) == (keys or len(found))
        assert len(found) > 20 * (keys is None)
        asked = [key for key in by_key if f" {key}" in question]
        assert len(asked) == queries
        assert sorted(made.answers) == sorted(v for key in asked for v in by_key[key])
        assert len(made.answers) == values * queries
        assert all(key in made.answer_prefix for key in asked)
        for key, value in found:
            assert bool(UUID.fullmatch(key)) == key_is_uuid
            assert bool(UUID.fullmatch(value)) == value_is_uuid
            assert key_is_uuid or re.fullmatch(r"[a-z]+-[a-z]+", key)
            assert value_is_uuid or re.fullmatch(r"[1-9]\d{6}", value)


def test_depths_are_the_published_ones_and_where_the_needles_are():
    seen = []
    for index in range(40):
        made = make("niah_multikey_1", 2048, index)
        assert made.depths == sorted(set(made.depths))
        assert set(made.depths) <= set(DEPTHS)
        parts = sentences(made.prompt.split("\n")[1].split())
        places = [i for i, part in enumerate(parts) if NEEDLE.fullmatch(part)]
        others = len(parts) - len(places)
        assert [int(others * d / 100) + n for n, d in enumerate(made.depths)] == places
        seen += made.depths
    assert min(seen) < 6
    assert max(seen) > 94
    assert DEPTHS[:3] + DEPTHS[-2:] == [0, 3, 5, 97, 100]


def test_a_single_needle_is_anywhere_in_the_noise():
    depths = [make("niah_single_1", 1024, index).depths[0] for index in range(60)]
    assert min(depths) < 15
    assert max(depths) > 85
    text = make("niah_single_1", 1024).prompt
    assert text.count(NOISE) > 10


def test_variables_form_one_chain_of_four_hops_after_a_worked_example():
    made = make("vt", 2048, 3)
    shown, asked = made.prompt.split("\n\n")
    for text, names, letters in ((shown, shown.split(" are: ")[1].split(), 3), (asked, None, 5)):
        chain = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", text)
        assert [len(name) for name, _ in chain] == [letters] * 5
        value = chain[0][1]
        assert re.fullmatch(r"\d{5}", value)
        assert [right for _, right in chain[1:]] == [name for name, _ in chain[:-1]]
        assert value in text.split("Question")[1]
        assert [name for name, _ in chain] == (names or made.answers)


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (8192, 30, 3)])
def test_common_words_come_up_as_often_as_published(length, often, seldom):
    made = make("cwe", length)
    shown, asked = made.prompt.split("\n\n")
    counts = Counter(re.findall(r"\d+\. (\w+)", asked))
    assert len(made.answers) == 10
    assert {counts.pop(word) for word in made.answers} == {often}
    # The last word of the list may be cut short, so that the length fits.
    assert sorted(set(counts.values()))[-1] == seldom
    assert sum(n != seldom for n in counts.values()) <= 1
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", asked)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert shown.count("1. ") >= 2  # the list and its answer


def test_frequent_words_follow_the_published_power_law():
    made = make("fwe", 8192)
    text = made.prompt.split("\n")[1].split()
    counts = Counter(text).most_common()
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == made.answers
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
    for rank, (_, n) in enumerate(counts[:6], 1):
        assert n == pytest.approx(counts[0][1] / rank**2, abs=1)


def test_questions_keep_their_documents_whole(documents):
    questions = [json.loads(line) for line in documents.read_text().splitlines()]
    for index in (0, 7):
        made = make("qa", 4096, index, documents)
        assert questions[index]["documents"][0] in made.prompt
        assert made.answers == questions[index]["answers"]
        listed = re.findall(r"Document (\d+):", made.prompt)
        assert [int(n) for n in listed] == list(range(1, len(listed) + 1))
    places = [
        make("qa", 4096, i, documents).prompt.index(questions[i]["documents"][0]) for i in range(8)
    ]
    assert max(places) > 2 * min(places)


def test_an_example_depends_on_its_name_alone():
    sources = Sources()
    several = [example("niah_multikey_2", 2048, i, size, sources) for i in (5, 3, 4)]
    assert several[1] == make("niah_multikey_2", 2048, 3)
    assert make("vt", 2048, 3) != make("vt", 2048, 3, seed=1)
    prompts = {make("niah_single_1", 1024, i).prompt for i in range(20)}
    assert len(prompts) == 20


def test_prose_of_our_own_does_not_repeat():
    found = sentences(Sources().prose(20_000))
    assert len(set(found)) > 0.97 * len(found)


def test_filler_of_the_users(tmp_path):
    path = tmp_path / "filler.txt"
    path.write_text("Birds sing. Bells ring twice.\n")
    made = example("niah_single_2", 1024, 0, size, Sources(filler=path))
    assert made.prompt.count("Birds sing. Bells ring twice.") > 80


@pytest.mark.parametrize(
    ("task", "answer", "references", "expected"),
    [
        ("niah_single_1", "The number is 1234567.", ["1234567"], 1),
        ("niah_single_1", "12345678 or 01234567", ["1234567"], 1),  # a part of a longer one counts
        ("niah_single_1", "123456 7", ["1234567"], 0),
        ("niah_multivalue", "11, 22 and 33", ["11", "22", "44", "33"], 0.75),
        ("niah_multivalue", "", ["11", "22"], 0),
        ("vt", "abcde FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], 0.4),
        ("cwe", "1. Apple 2. pear", ["apple", "pear", "plum", "fig"], 0.5),
        ("fwe", " uvwxyz\tabcdef", ["abcdef", "uvwxyz", "mnopqr"], 2 / 3),
        ("qa", "It was the Warden, I think", ["nobody", "the warden"], 1),
        ("qa", "It was nobody\x00known", ["somebody", "no one"], 0),
        ("qa", "line\x07break", ["line\nbreak"], 1),
    ],
)
def test_metrics_agree_with_the_published_ones(task, answer, references, expected):
    assert score(task, answer, references) == pytest.approx(expected)


def test_a_length_that_is_too_short_says_so():
    with pytest.raises(UserError, match="greater lengths"):
        make("cwe", 512)


def test_documents_that_do_not_fill_the_length_say_so(documents):
    with pytest.raises(UserError, match="give more"):
        make("qa", 200_000, 0, documents)
    with pytest.raises(UserError, match="--documents"):
        make("qa", 4096)


@pytest.mark.parametrize("line", ["", "[]", '{"question": "a"}', '{"question": 1, "answers": []}'])
def test_documents_of_another_form_are_refused(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_text(line + "\n" if line else "")
    with pytest.raises(UserError, match=r"questions\.jsonl"):
        make("qa", 4096, 0, path)
