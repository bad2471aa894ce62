"""answers.py, critic.py: pairs, rows, drawing, log-probabilities, scores. Run: pytest tests/test_answers.py"""

import json
import math

import pytest
import torch

from config.presets import PRESETS
from flatgpt.generate import Sampling, generate, uniforms
from model import GPT, GPTConfig
from posttrain import pairs as answers
from posttrain import reward_model, rollouts
from tokenizer import BPETokenizer, chat

TOKENIZER = BPETokenizer([], None, {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)})  # one a byte
START, SYSTEM, USER, ASSISTANT, TOOL, END = range(256, 262)
PAIR = {'messages': [{'role': 'user', 'content': '2+2?'}], 'chosen': '4', 'rejected': '55'}


def tiny(preset='gpt2', **changes):
    torch.manual_seed(0)
    sizes = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 32, 'vocab_size': 266}
    return GPT(GPTConfig(**{**PRESETS[preset], **sizes, **changes})).eval()


# pairs ----------------------------------------------------------------------------------------------------------------


def write_pairs(path, values):
    path.write_text(''.join(json.dumps(value) + '\n' for value in values))
    return str(path)


def read(path, block_size=32, val_fraction=0.5, template=chat.TEMPLATE):
    return answers.read_pairs(path, template, TOKENIZER, block_size, val_fraction)


def test_a_pair_by_hand():
    (ids, mask), (other, _) = answers.render_pair(PAIR, chat.TEMPLATE, TOKENIZER)
    assert ids == [START, USER, *b'2+2?', END, ASSISTANT, *b'4', END]
    assert mask == [0] * 8 + [1, 1]  # also the token that ends the answer
    assert other == ids[:8] + [*b'55', END]


def test_earlier_answers_do_not_count():
    messages = [{'role': role, 'content': text} for role, text in (('user', 'a'), ('assistant', 'b'), ('user', 'c'))]
    ids, mask = answers.render_answer(messages, 'd', chat.TEMPLATE, TOKENIZER)
    assert [i for i, counts in zip(ids, mask, strict=True) if counts] == [*b'd', END]


def test_nothing_follows_the_end_of_an_answer():
    """Qwen's templates, for example, write a line break after it."""
    template = ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    ids, mask = answers.render_answer(PAIR['messages'], '4', template, TOKENIZER)
    assert ids[-2:] == [*b'4', END] and mask[-3:] == [0, 1, 1]


def test_where_an_answer_is_judged():
    """At the special token that ends it, also where a template has {% generation %} around more, or around less."""
    around = ("{% for m in messages %}<|user|>{% generation %}{{ m.content + END }}{% endgeneration %}{% endfor %}"
              "{% if add_generation_prompt %}<|user|>{% endif %}")
    more, less = around.replace('END', "'<|im_end|>\\n'"), around.replace('END', "''")
    ids, _ = answers.render_answer(PAIR['messages'], '4', more, TOKENIZER)
    assert ids[-2:] == [*b'4', END] and answers.ending_of(more, TOKENIZER) == END
    with pytest.raises(ValueError, match='ends an answer with no special token that is learnt with it'):
        answers.ending_of(less, TOKENIZER)


def test_an_answer_of_which_nothing_counts():
    """A template that has earlier answers alone in {% generation %}: what it masks is not this one."""
    template = chat.TEMPLATE.replace("message.role == 'assistant'", "message.role == 'assistant' and not loop.last")
    messages = [{'role': role, 'content': text} for role, text in (('user', 'a'), ('assistant', 'b'), ('user', 'c'))]
    for asked in (messages, messages[:1]):
        with pytest.raises(ValueError, match='of the answer "d" the chat template leaves no token to learn from'):
            answers.render_answer(asked, 'd', template, TOKENIZER)


def test_splits(tmp_path):
    """All pairs of a conversation are on one side; half of the conversations are held out; long ones are counted."""
    values = [{**PAIR, 'messages': [{'role': 'user', 'content': str(i % 100)}], 'chosen': f'n{i}'} for i in range(400)]
    too_long = [{**PAIR, 'chosen': 'x' * 40}, {**PAIR, 'rejected': 'x' * 40}]
    pairs, n_too_long = read(write_pairs(tmp_path / 'pairs.jsonl', values + too_long))
    assert n_too_long == 2 and len(pairs['train']) + len(pairs['val']) == 400 and len(pairs['val']) % 4 == 0
    assert 120 < len(pairs['val']) < 280
    prompts = [{tuple(ids[: ids.index(ASSISTANT)]) for (ids, _), _ in pairs[split]} for split in pairs]
    assert len(prompts[0] | prompts[1]) == 100 and not prompts[0] & prompts[1]
    groups = [{**value, 'group': str(i % 5)} for i, value in enumerate(values)]
    pairs, _ = read(write_pairs(tmp_path / 'pairs.jsonl', groups))
    assert len(pairs['train']) % 80 == len(pairs['val']) % 80 == 0 < len(pairs['val'])  # five groups of 80
    none = [{**value, 'group': None} for value in values]  # as a table writes what a row does not have
    assert read(write_pairs(tmp_path / 'pairs.jsonl', none)) == read(write_pairs(tmp_path / 'pairs.jsonl', values))


@pytest.mark.parametrize('change, said', [
    ({'rejected': '4'}, 'chosen equals rejected, "4"'), ({'chosen': ' '}, 'chosen is empty'),
    ({'rejected': ''}, 'rejected is empty'), ({'chosen': 4}, 'chosen is 4; expected {"messages"'),
    ({'messages': None}, 'messages is null'), ({'messages': []}, 'messages are a list of at least one'),
    ({'messages': [{'role': 'bot', 'content': '2'}]}, 'a role, one of system, user, assistant, tool'),
    ({'messages': [*PAIR['messages'], {'role': 'assistant', 'content': '4'}]}, "the assistant's own"),
    ({'messages': 2 * PAIR['messages']}, "both of role 'user'"),
    ({'rejected': '<|python|>2+2<|python_end|><|output|>4'}, 'has an <|output|> without an'),
])
def test_bad_pairs_are_named_by_line(tmp_path, change, said):
    path = write_pairs(tmp_path / 'pairs.jsonl', [PAIR, {**PAIR, **change}])
    with pytest.raises(ValueError) as error:
        read(path)
    assert f'{path}, line 2: ' in str(error.value) and said in str(error.value)


def test_equal_in_the_template(tmp_path):
    """A template that strips contents makes these equal."""
    template = chat.TEMPLATE.replace('message.content', 'message.content.strip()')
    with pytest.raises(ValueError, match='line 1: chosen equals rejected'):
        read(write_pairs(tmp_path / 'pairs.jsonl', [{**PAIR, 'rejected': ' 4'}]), template=template)


def test_nothing_left(tmp_path):
    path = write_pairs(tmp_path / 'pairs.jsonl', [PAIR, {**PAIR, 'chosen': '5'}])
    with pytest.raises(ValueError, match='of 2 pairs in .* 2 are longer than the context of 8 tokens'):
        read(path, block_size=8)
    with pytest.raises(ValueError, match='none is in val'):
        read(path, val_fraction=0.001)


def test_rows():
    idx, mask = rollouts.pair_rows([(([1, 2, 3], [0, 1, 1]), ([1, 4], [0, 1]))], torch.device('cpu'))
    assert idx.tolist() == [[1, 2, 3], [1, 4, 0]]
    assert mask.tolist() == [[False, True, True], [False, True, False]]


# drawing --------------------------------------------------------------------------------------------------------------

PROMPTS = [[START, USER, 65, END, ASSISTANT], [66], [START, USER, 67, 68, 69, END, ASSISTANT], [66]]


def draw(model, stop_ids, temperature=1.0, n=12):
    u = torch.stack([uniforms(7, i, 0, n) for i in range(len(PROMPTS))])
    return rollouts.draw_answers(model, PROMPTS, n, stop_ids, 266, temperature, u), u


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
    ending = answers.ending_of(chat.TEMPLATE, TOKENIZER)
    assert ending == END
    drawn = [[*b'ok', END], [*b'ok'], [*b'ok', START], [*b'another', END], [END]]
    scores = rollouts.scores_of(model, [PROMPTS[0]] * 5, drawn, {START, END}, ending)
    for answer, score in zip(drawn, scores, strict=True):
        whole = PROMPTS[0] + [i for i in answer if i < 256] + [END]
        torch.testing.assert_close(score, model(torch.tensor([whole]))[0, -1])
    assert scores[0] == scores[1] == scores[2] != scores[3]
    ids, _ = answers.render_answer([{'role': 'user', 'content': 'A'}], 'ok', chat.TEMPLATE, TOKENIZER)
    assert ids == PROMPTS[0] + drawn[0]  # what the reward model has learnt from is what it judges


def test_ratings():
    """As the reward model has seen pairs; never the best are an empty answer, and one longer than its context."""
    model = trained_head(reward_model.Critic.from_gpt(tiny()).eval())
    messages, texts = [{'role': 'user', 'content': 'A'}], ['ok', ' ', 'another', 'x' * model.config.block_size]
    ratings = rollouts.ratings_of(model, messages, texts, chat.TEMPLATE, TOKENIZER)
    assert ratings[1] == ratings[3] == -math.inf
    for i in (0, 2):
        ids, _ = answers.render_answer(messages, texts[i], chat.TEMPLATE, TOKENIZER)
        assert ratings[i] == pytest.approx(model(torch.tensor([ids]))[0, -1].item(), abs=1e-5)
    assert rollouts.ratings_of(model, messages, ['', ''], chat.TEMPLATE, TOKENIZER) == [-math.inf] * 2


def test_ratings_of_whatever_a_model_writes():
    """Calls that were cut off, or are no calls; at the ending that closes the answer, as for whole ones."""
    model = trained_head(reward_model.Critic.from_gpt(tiny(block_size=64)).eval())
    call = f'{chat.PYTHON}2*3{chat.PYTHON_END}'
    texts = [call, f'{call}{chat.OUTPUT}6', chat.OUTPUT, f'{chat.OUTPUT_END}a{chat.OUTPUT}', 'a<|user|>b',
             '\ufffd']
    ratings = rollouts.ratings_of(model, [{'role': 'user', 'content': 'A'}], texts, chat.TEMPLATE, TOKENIZER)
    for text, rating in zip(texts, ratings, strict=True):
        whole = PROMPTS[0] + TOKENIZER.encode(text, allowed_special='all') + [END]
        assert rating == pytest.approx(model(torch.tensor([whole]))[0, -1].item(), abs=1e-5)
