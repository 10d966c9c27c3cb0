"""A conversation re-uses its cache across turns and survives being interrupted."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from zoo import build

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.generation.conversation import Conversation, Interrupted
from mlx_loop.generation.prompt import thought_marks
from mlx_loop.method.cache import tokens_seen


@pytest.fixture
def talk():
    # Under `own` the logits do not depend on how the text is fed, so turns can be compared.
    model, tokenizer = mlx_loop.load("demo", dtype="float32", loop=LoopConfig(cache="own"))
    return Conversation(model, tokenizer)


def say(talk, text, **generation):
    responses = list(talk.reply(text, max_tokens=24, **generation))
    return "".join(r.text for r in responses), responses


def fresh(talk, messages, loop="same"):
    """A conversation with the same messages and an empty cache."""
    model = talk.model.with_loop(talk.loop if loop == "same" else loop)
    return Conversation(model, talk.tokenizer, talk.system, messages=list(messages))


def test_only_new_tokens_are_processed(talk):
    say(talk, "My name is Anna.")
    whole = len(talk._render([*talk.messages, {"role": "user", "content": "What is my name?"}]))
    held = len(talk._tokens)
    _, responses = say(talk, "What is my name?")
    assert responses[0].prompt_tokens == whole - held
    assert responses[0].prompt_tokens < whole / 2


def test_the_cache_holds_the_tokens_that_it_is_said_to_hold(talk):
    for text in ("hello", "What is 12 + 30?", "thanks"):
        say(talk, text)
        assert tokens_seen(talk._cache) == len(talk._tokens)


def test_answers_are_those_of_a_conversation_without_a_cache(talk):
    for text in ("My name is Anna.", "What is 12 + 30?", "What is my name?"):
        expected, _ = say(fresh(talk, talk.messages), text)
        assert say(talk, text)[0] == expected


@pytest.mark.parametrize(
    ("opened", "begun"), [("", False), ("<think>\\n", True), ("<think>\\n\\n</think>\\n\\n", False)]
)
def test_thoughts_that_the_template_begins_are_known(tmp_path, opened, begun):
    shutil.copytree(DEMOS["demo"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for i, name in enumerate(("<think>", "</think>")):
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][-1], "id": 1024 + i, "content": name}
        )
    file.write_text(json.dumps(tokenizer))
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", f"assistant\\n{opened}"))
    talk = Conversation(*mlx_loop.load(tmp_path))
    assert thought_marks(talk.tokenizer) == ("<think>", "</think>")
    assert talk.begins_with_thoughts is begun


def test_a_model_without_thoughts_begins_none(talk):
    assert thought_marks(talk.tokenizer) is None
    assert not talk.begins_with_thoughts


def test_the_thoughts_of_gpt_oss_are_its_analysis():
    words = {"<|channel|>": 0}
    begin, end = thought_marks(SimpleNamespace(has_thinking=False, get_vocab=lambda: words))
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4"
    assert said == f"{begin}Hm.{end}4"


def test_messages_alternate(talk):
    say(talk, "hello")
    say(talk, "thanks")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_an_interrupted_answer_stays_and_the_talk_goes_on(talk):
    stream = talk.reply("Tell me a story.", max_tokens=24)
    for _ in range(4):
        next(stream)
    stream.close()
    assert talk.messages[-1]["role"] == "assistant"
    assert tokens_seen(talk._cache) == len(talk._tokens)
    expected, _ = say(fresh(talk, talk.messages), "thanks")
    assert say(talk, "thanks")[0] == expected


def test_an_interruption_between_chunks_of_the_prompt_loses_nothing(talk):
    say(talk, "hello")
    before = list(talk.messages)

    def stop(done, total):
        if done:
            raise Interrupted

    with pytest.raises(Interrupted):
        list(talk.reply("What is 12 + 30?", stop, prefill_step_size=4))
    assert talk.messages == before
    assert tokens_seen(talk._cache) == len(talk._tokens)
    expected, _ = say(fresh(talk, before), "What is 12 + 30?")
    assert say(talk, "What is 12 + 30?")[0] == expected


def test_an_error_in_the_middle_of_a_pass_drops_the_cache(talk):
    say(talk, "hello")
    before = list(talk.messages)
    layer = talk.model.model.layers[5]

    class Broken:
        def __call__(self, *args):
            raise RuntimeError("in the middle")

    talk.model.model.layers[5] = Broken()
    with pytest.raises(RuntimeError):
        say(talk, "thanks")
    talk.model.model.layers[5] = layer
    assert talk.messages == before
    expected, _ = say(fresh(talk, before), "thanks")
    assert say(talk, "thanks")[0] == expected


def test_new_loop_settings_recompute_what_was_said(talk):
    say(talk, "My name is Anna.")
    new = LoopConfig(loops=6, cache="own")
    expected, _ = say(fresh(talk, talk.messages, new), "What is my name?")
    talk.loop = new
    text, responses = say(talk, "What is my name?")
    assert text == expected
    assert responses[0].prompt_tokens == len(talk._tokens) - responses[-1].generation_tokens


def test_a_new_decode_setting_alone_recomputes_nothing(talk):
    say(talk, "hello")
    held = talk._tokens
    talk.loop = LoopConfig(cache="own", decode="bypass")
    assert talk._tokens is held


def test_settings_that_are_refused_change_nothing(talk):
    say(talk, "hello")
    before, held = talk.loop, talk._tokens
    with pytest.raises(UserError):
        talk.loop = LoopConfig(window=(30, 40))
    assert talk.loop == before
    assert talk._tokens is held


def test_a_new_system_message_keeps_what_still_fits(talk):
    say(talk, "hello")
    talk.system = "You are a pirate."
    expected, _ = say(fresh(talk, talk.messages), "thanks")
    assert say(talk, "thanks")[0] == expected


def test_reset_starts_again(talk):
    first = say(talk, "hello")[0]
    talk.reset()
    assert talk.messages == []
    assert say(talk, "hello")[0] == first


def test_a_rotating_cache_goes_on_past_its_size(talk):
    small = Conversation(talk.model.with_loop(LoopConfig()), talk.tokenizer, max_kv_size=64)
    for text in ("Tell me a story.", "Tell me a story.", "hello", "thanks"):
        assert say(small, text)[0]
    assert len(small._tokens) > 64


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5", "mamba2"])
def test_windows_and_recurrent_state_need_no_second_look_at_the_conversation(talk, name):
    # The template renders an answer as it was generated, but for the token that ended it.
    model = build(name, vocab_size=1024).with_loop(LoopConfig(loops=2, cache="own"))
    turns = Conversation(model, talk.tokenizer)
    for text in ("Tell me a story.", "hello", "thanks"):
        held = len(turns._bookmark[0]) if turns._bookmark else 0
        again = fresh(turns, turns.messages)
        expected = say(again, text)
        found = say(turns, text)
        assert found[0] == expected[0]
        assert found[1][0].prompt_tokens <= expected[1][0].prompt_tokens - held


def test_a_conversation_goes_back_to_its_own_text_only(talk):
    model = build("gpt_oss", vocab_size=1024).with_loop(LoopConfig(loops=2, cache="own"))
    turns = Conversation(model, talk.tokenizer)
    say(turns, "hello")
    turns.messages = []

    def stop(done, total):
        if done > 100:
            raise Interrupted

    story = "Tell me a story of one, two, three and four. " * 9
    with pytest.raises(Interrupted):
        list(turns.reply(story, stop, prefill_step_size=4))
    expected, _ = say(fresh(turns, []), story[:90])
    assert say(turns, story[:90])[0] == expected


def test_a_model_without_a_chat_template_is_refused(talk):
    class Plain:
        has_chat_template = False

    with pytest.raises(UserError, match="no chat template"):
        Conversation(talk.model, Plain())


def test_under_a_plain_prompt_other_loops_keep_the_first_prompt_and_what_had_no_loop(talk):
    talk.loop = None
    say(talk, "My name is Anna.")
    held = len(talk._tokens)
    talk.loop = LoopConfig(prompt="plain", loops=4)
    expected, _ = say(fresh(talk, talk.messages), "What is my name?")
    found, responses = say(talk, "What is my name?")
    assert found == expected
    # All that the un-looped model has left is still good.
    assert responses[0].prompt_tokens == len(talk._bookmark[0]) + 1 - held
    first = talk._plain
    talk.loop = LoopConfig(prompt="plain", loops=6, window=(3, 5))
    expected, _ = say(fresh(talk, talk.messages), "thanks")
    found, responses = say(talk, "thanks")
    assert found == expected
    assert responses[0].prompt_tokens == len(talk._bookmark[0]) + 1 - first
    talk.loop = LoopConfig(loops=6)
    assert talk.cache_summary() == "empty"
