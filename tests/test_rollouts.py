"""
rollouts.py, reward_model.py: rows, drawing, log-probabilities, scores. Run: pytest tests/test_rollouts.py
"""

import math

import pytest
import torch
from chat_models import ASSISTANT, END, START, TOKENIZER, USER, tiny

from config.presets import PRESETS
from flatgpt.generate import Sampling, generate, uniforms
from posttrain import preferences, reward_model, rollouts
from tokenizer import chat

# rows -----------------------------------------------------------------------------------------------------------------


def test_rows():
    idx, mask = preferences.pair_rows([(([1, 2, 3], [0, 1, 1]), ([1, 4], [0, 1]))], torch.device('cpu'))
    assert idx.tolist() == [[1, 2, 3], [1, 4, 0]]
    assert mask.tolist() == [[False, True, True], [False, True, False]]


def test_micro_batches():
    """Every row once, in parts of similar lengths with the longest of each part."""
    lengths = torch.tensor([5, 1, 9, 2, 7])
    parts = rollouts.micro_batches(torch.tensor([0, 2, 3, 4]), lengths, 2)
    assert [(part.tolist(), longest) for part, longest in parts] == [([3, 0], 5), ([4, 2], 9)]


# drawing --------------------------------------------------------------------------------------------------------------

PROMPTS = [[START, USER, 65, END, ASSISTANT], [66], [START, USER, 67, 68, 69, END, ASSISTANT], [66]]


def draw(model, stop_ids, temperature=1.0, n=12):
    u = torch.stack([uniforms(7, i, 0, n) for i in range(len(PROMPTS))])
    return rollouts.draw_answers(model, PROMPTS, Sampling(n, temperature, n_ids=266, stop_ids=stop_ids), u), u


def test_answers_end():
    """At the first of the stop ids, which is theirs, or at the length; whatever the others of the batch do."""
    free, _ = draw(tiny(), stop_ids={300})  # no such id
    assert [len(answer) for answer in free] == [12] * 4 and free[1] != free[3]
    stop = {free[0][3], free[1][7]}
    for answer, whole in zip(draw(tiny(), stop)[0], free, strict=True):
        end = next((n for n, i in enumerate(whole, 1) if i in stop), 12)
        assert answer == whole[:end]
    assert len(draw(tiny(), stop)[0][0]) <= 4


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_logprobs_are_those_it_was_drawn_with(preset, temperature):
    """From a padded row at once, what generate() said token by token; over the ids of the tokenizer alone."""
    model = tiny(preset, vocab_size=320)
    drawn, u = draw(model, {END}, temperature)
    idx, mask = rollouts.to_rows([(prompt + answer, [0] * len(prompt) + [1] * len(answer))
                                 for prompt, answer in zip(PROMPTS, drawn, strict=True)], torch.device('cpu'))
    logprobs, entropies = rollouts.logprobs_of(model, idx, mask, 266, temperature)
    assert logprobs.shape == entropies.shape == (4, idx.size(1) - 1)
    assert not logprobs[~mask[:, 1:]].any() and not entropies[~mask[:, 1:]].any()
    steps = list(generate(model, PROMPTS, Sampling(12, temperature, n_ids=266), u))
    if temperature == 1.0:  # it gives those of the model itself
        said = torch.cat([step_logprobs for _, step_logprobs, _ in steps], dim=1)
        for row, (prompt, answer) in enumerate(zip(PROMPTS, drawn, strict=True)):
            mine = logprobs[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            torch.testing.assert_close(mine, said[row, : len(answer)], atol=1e-4, rtol=0)
    row, place = 2, len(PROMPTS[2]) + 1  # the second token of an answer, by hand
    logits = model(idx[row : row + 1, :place])[0][0, -1, :266] / temperature
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs[row, place - 1], expected.log_prob(idx[row, place]), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies[row, place - 1], expected.entropy(), atol=1e-5, rtol=0)


def test_gradient_reaches_what_counts_alone():
    """The log-probability of a token depends on what is before it; not on padding, nor on what the mask leaves out."""
    model = tiny()
    idx, mask = torch.tensor([[1, 2, 3, 4, 0, 0]]), torch.tensor([[0, 0, 1, 1, 0, 0]]).bool()
    rollouts.logprobs_of(model, idx, mask, 266)[0].sum().backward()
    used = model.transformer.wpe.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 3 + [False] * 29  # three inputs for two predictions


# scores ---------------------------------------------------------------------------------------------------------------


def trained_head(model):
    torch.nn.init.normal_(model.value_head.weight)
    torch.nn.init.normal_(model.value_head.bias)
    return model


@pytest.mark.parametrize('preset', PRESETS)
def test_critic_is_the_trunk_and_a_head(preset):
    model = tiny(preset)
    value_model = reward_model.Critic.from_gpt(model).eval()
    idx = torch.randint(266, (3, 9))
    assert not value_model(idx).any()  # it expects nothing yet
    trained_head(value_model)
    values = value_model(idx)
    head = value_model.value_head
    torch.testing.assert_close(values, model.hidden(idx) @ head.weight[0] + head.bias)
    torch.testing.assert_close(value_model.scores(idx, torch.tensor([9, 4, 1])), values[[0, 1, 2], [8, 3, 0]])
    changed = idx.clone()
    changed[:, 4:] = 0  # padding, as seen from the front
    torch.testing.assert_close(value_model(changed)[:, :4], values[:, :4])
    with torch.no_grad():
        next(value_model.parameters()).zero_()
    assert next(model.parameters()).any()  # a copy


def test_scores_of_answers():
    """At the ending, also of one that was cut off or ended by another token; padding changes nothing."""
    model = trained_head(reward_model.Critic.from_gpt(tiny()).eval())
    ending = preferences.ending_of(chat.TEMPLATE, TOKENIZER)
    assert ending == END
    drawn = [[*b'ok', END], [*b'ok'], [*b'ok', START], [*b'another', END], [END]]
    scores = reward_model.scores_of(model, [PROMPTS[0]] * 5, drawn, {START, END}, ending)
    for answer, score in zip(drawn, scores, strict=True):
        whole = PROMPTS[0] + [i for i in answer if i < 256] + [END]
        torch.testing.assert_close(score, model(torch.tensor([whole]))[0, -1])
    assert scores[0] == scores[1] == scores[2] != scores[3]
    ids, _ = preferences.render_answer([{'role': 'user', 'content': 'A'}], 'ok', chat.TEMPLATE, TOKENIZER)
    assert ids == PROMPTS[0] + drawn[0]  # what the reward model has learnt from is what it judges


def test_ratings():
    """As the reward model has seen pairs; never the best are an empty answer, and one longer than its context."""
    model = trained_head(reward_model.Critic.from_gpt(tiny()).eval())
    messages, texts = [{'role': 'user', 'content': 'A'}], ['ok', ' ', 'another', 'x' * model.config.block_size]
    ratings = reward_model.ratings_of(model, messages, texts, chat.TEMPLATE, TOKENIZER)
    assert ratings[1] == ratings[3] == -math.inf
    for i in (0, 2):
        ids, _ = preferences.render_answer(messages, texts[i], chat.TEMPLATE, TOKENIZER)
        assert ratings[i] == pytest.approx(model(torch.tensor([ids]))[0, -1].item(), abs=1e-5)
    assert reward_model.ratings_of(model, messages, ['', ''], chat.TEMPLATE, TOKENIZER) == [-math.inf] * 2


def test_ratings_of_whatever_a_model_writes():
    """Calls that were cut off, or are no calls; at the ending that closes the answer, as for whole ones."""
    model = trained_head(reward_model.Critic.from_gpt(tiny(block_size=64)).eval())
    call = f'{chat.PYTHON}2*3{chat.PYTHON_END}'
    texts = [call, f'{call}{chat.OUTPUT}6', chat.OUTPUT, f'{chat.OUTPUT_END}a{chat.OUTPUT}', 'a<|user|>b',
             '\ufffd']
    ratings = reward_model.ratings_of(model, [{'role': 'user', 'content': 'A'}], texts, chat.TEMPLATE, TOKENIZER)
    for text, rating in zip(texts, ratings, strict=True):
        whole = PROMPTS[0] + TOKENIZER.encode(text, allowed_special='all') + [END]
        assert rating == pytest.approx(model(torch.tensor([whole]))[0, -1].item(), abs=1e-5)
