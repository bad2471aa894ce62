"""Losses: values worked by hand, brute force, gradients. Run: pytest tests/test_losses.py"""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from posttrain import losses


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **tolerance)


def gradient(f, x):
    """df/dx, x a list of numbers."""
    x = torch.tensor(x, requires_grad=True)
    return torch.autograd.grad(f(x), x)[0]


# of a model -----------------------------------------------------------------------------------------------------------


def test_token_logprobs_of_large_logits():
    """At logits near 1e4, where fp32 has steps of 0.001, they keep their digits."""
    logits = torch.randn(64, 500) * 3 + 1e4
    ids = torch.randint(500, (64,))
    exact = -F.cross_entropy(logits.double(), ids, reduction='none')
    assert ((losses.token_logprobs(logits, ids) - exact) / exact).abs().max() < 1e-6


def test_token_logprobs():
    """log 1/4, 1/2 of logits log 1, log 2, log 1; cross-entropy otherwise; in fp32 whatever the logits are in."""
    logits = torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]]).log()
    close(losses.token_logprobs(logits, torch.tensor([0, 1])), [math.log(1 / 4), math.log(1 / 2)])
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    close(losses.token_logprobs(logits, ids), -F.cross_entropy(logits.mT, ids, reduction='none'))
    assert losses.token_logprobs(logits.bfloat16(), ids).dtype == torch.float32


def test_entropy():
    close(losses.entropy(torch.zeros(3, 8)), [math.log(8)] * 3)
    close(losses.entropy(torch.tensor([1.0, 2.0, 1.0]).log()), 1.5 * math.log(2))  # of 1/4, 1/2, 1/4
    logits = torch.randn(2, 5, 7)
    close(losses.entropy(logits), torch.distributions.Categorical(logits=logits).entropy())
    impossible = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    losses.entropy(impossible).backward()
    close(losses.entropy(impossible).detach(), math.log(2))
    close(impossible.grad, [0.0, 0.0, 0.0])


def test_kl_estimates():
    k1, k3 = losses.kl_estimates(torch.tensor(0.5).log(), torch.tensor(0.25).log())
    close(k1, math.log(2))
    close(k3, 0.5 - 1 + math.log(2))


def test_kl_estimates_are_of_the_kl():
    """The expectation over what p draws: k1 and k3 have exactly that of KL(p || q); k3 is never negative."""
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(6).double().log_softmax(0) for _ in range(2))
    k1, k3 = losses.kl_estimates(log_p, log_q)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction='sum')
    close((log_p.exp() * k1).sum(), kl)
    close((log_p.exp() * k3).sum(), kl)
    assert (k1 < 0).any() and (k3 >= 0).all()
    # where the two are equal nothing pulls
    close(gradient(lambda x: losses.kl_estimates(x, torch.tensor([-1.0, -2.0]))[1].sum(), [-1.0, -2.0]), [0.0, 0.0])


# averages -------------------------------------------------------------------------------------------------------------

X, MASK = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize('mask', [MASK, MASK.bool(), MASK.float()])
def test_masked_mean(mask):
    close(losses.masked_mean(X, mask), 7 / 3)
    close(losses.masked_mean(X, mask, dim=1), [1.5, 4.0])
    close(losses.masked_mean(X, torch.zeros(2, 3)), 0.0)


def test_what_does_not_count_may_be_anything():
    broken = torch.where(MASK.bool(), X, torch.nan)
    for f in (losses.masked_mean, losses.whiten):
        close(f(broken, MASK), f(X, MASK))
    old = torch.where(MASK.bool(), 0.0, -1000.0)  # a ratio of infinity
    x = torch.zeros(2, 3, requires_grad=True)
    losses.masked_mean(losses.clipped_policy_loss(x, old, X, MASK, 0.2), MASK).backward()
    close(x.grad, -X * MASK / 3)


def test_whiten():
    white = losses.whiten(X, MASK)  # of 1, 2, 4: mean 7/3, variance 14/9
    close(white, [[-4 / 14**0.5, -1 / 14**0.5, 0], [5 / 14**0.5, 0, 0]])
    close(losses.whiten(100 * X - 7, MASK), white)
    close(losses.whiten(torch.full((2, 3), 5.0), MASK), torch.zeros(2, 3))


def test_sequence_mean():
    """Each sequence counts the same; one without tokens is no sequence."""
    close(losses.sequence_mean(X, MASK), (1.5 + 4) / 2)
    close(losses.sequence_mean(torch.cat((X, X)), torch.cat((MASK, 0 * MASK))), (1.5 + 4) / 2)


@pytest.mark.parametrize('reduction, weights', [  # of the gradient of each action, answers of 2 and 1 tokens
    ('sequence-mean', [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0]]), ('token-mean', [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]]),
    ('constant', [[1 / 20, 1 / 20, 0], [1 / 20, 0, 0]])])
def test_reductions(reduction, weights):
    close(losses.reduce(X, MASK, reduction, 10), (X * torch.tensor(weights)).sum())
    close(gradient(lambda x: losses.reduce(x, MASK, reduction, 10), X.tolist()), weights)
    broken = torch.where(MASK.bool(), X, torch.inf)
    close(losses.reduce(broken, MASK, reduction, 10), losses.reduce(X, MASK, reduction, 10))


# preferences ----------------------------------------------------------------------------------------------------------


def test_bradley_terry():
    chosen, rejected = torch.tensor([3.0, 1.0, -2.0]), torch.tensor([1.0, 1.0, 0.0])
    odds = [math.exp(2), 1.0, math.exp(-2)]  # P(chosen wins) = odds / (1 + odds)
    close(losses.bradley_terry_loss(chosen, rejected), [-math.log(o / (1 + o)) for o in odds])
    # the gradient is that of a probability that was too low
    close(gradient(lambda x: losses.bradley_terry_loss(x, rejected).sum(), chosen.tolist()),
          [o / (1 + o) - 1 for o in odds])
    assert losses.bradley_terry_loss(torch.tensor(-1e4), torch.tensor(0.0)).isfinite()


def test_a_tie_is_half_preferred():
    assert losses.preferred(torch.tensor([0.1, 0.0, -2.0])).tolist() == [1.0, 0.5, 0.0]


def test_dpo_by_hand():
    """Against the reference the policy finds the chosen e^2 times, the rejected e^-1 times as likely; beta 0.5."""
    loss, chosen, rejected = losses.dpo_loss(torch.tensor([[-3.0], [-6.0]]), torch.tensor([[-5.0], [-5.0]]), beta=0.5)
    close(loss, [-math.log(1 / (1 + math.exp(-1.5)))])
    close(chosen, [1.0])
    close(rejected, [-0.5])


def test_dpo():
    torch.manual_seed(0)
    four = torch.randn(4, 9)
    loss, chosen, rejected = losses.dpo_loss(four[:2], four[2:], beta=0.3)
    close(loss, -torch.sigmoid(0.3 * ((four[0] - four[1]) - (four[2] - four[3]))).log())
    close(loss, losses.bradley_terry_loss(chosen, rejected))
    close(losses.dpo_loss(four[:2], four[:2], beta=0.3)[0], [math.log(2)] * 9)  # the policy is the reference
    # gradient: beta times how wrong the implicit rewards are, up for the chosen and as much down for the rejected
    policy = four[:2].clone().requires_grad_(True)
    loss, chosen, rejected = losses.dpo_loss(policy, four[2:], beta=0.3)
    assert not chosen.requires_grad and not rejected.requires_grad
    loss.sum().backward()
    close(policy.grad[0], -0.3 * torch.sigmoid(rejected - chosen))
    close(policy.grad[1], -policy.grad[0])


def test_dpo_label_smoothing():
    """Half of the pairs the wrong way round: nothing to learn where the two are equal, and the best is not infinite."""
    zeros = torch.zeros(2, 1)
    policy = torch.tensor([[2.0], [0.0]])
    plain, swapped = (losses.dpo_loss(pair, zeros, 1.0)[0] for pair in (policy, policy.flip(0)))
    close(losses.dpo_loss(policy, zeros, 1.0, label_smoothing=0.1)[0], 0.9 * plain + 0.1 * swapped)

    def slope(chosen, label_smoothing):
        return gradient(lambda x: losses.dpo_loss((x, zeros[1]), zeros, 1.0, label_smoothing)[0].sum(),
                        [chosen])

    close(slope(0.0, 0.5), [0.0])
    # odds of 9 to 1 are what a tenth of wrong labels asks for
    close(slope(math.log(9), 0.1), [0.0], atol=1e-6, rtol=0)


# generalized advantage estimates --------------------------------------------------------------------------------------


def test_gae_by_hand():
    """d = 0.5*0.2 - 0.1, 0.5*0.4 - 0.2, 1 - 0.4 = 0, 0, 0.6, each handed back by a factor of 0.5 * 0.5."""
    advantages, returns = losses.gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.2, 0.4]]), torch.ones(1, 3),
                                     gamma=0.5, lam=0.5)
    close(advantages, [[0.0375, 0.15, 0.6]])
    close(returns, [[0.1375, 0.35, 1.0]])


@pytest.mark.parametrize('places', [[0, 1, 2], [3, 4, 5], [2, 3, 4], [0, 3, 5]])  # before and behind; holes
def test_gae_knows_no_padding(places):
    """What does not count takes no time, and may have any value and reward."""
    rewards, values, mask = torch.full((1, 6), 9.0), torch.full((1, 6), -7.0), torch.zeros(1, 6, dtype=torch.bool)
    rewards[0, places], values[0, places] = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([0.1, 0.2, 0.4])
    mask[0, places] = True
    advantages, returns = losses.gae(rewards, values, mask, 0.9, 0.8)
    expected = losses.gae(rewards[:, places], values[:, places], torch.ones(1, 3), 0.9, 0.8)
    close(advantages[:, places], expected[0])
    close(returns[:, places], expected[1])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_at_its_ends():
    """lam=1: the discounted rewards to come, whatever the values are, minus the value; lam=0: one step ahead."""
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(4, 7), torch.randn(4, 7), torch.arange(7) < torch.tensor([[7], [5], [1], [2]])
    advantages, returns = losses.gae(rewards, values, mask, 0.9, 1.0)
    for row, n in enumerate((7, 5, 1, 2)):
        to_come = [sum(0.9 ** (s - t) * rewards[row, s].item() for s in range(t, n)) for t in range(n)]
        close(returns[row, :n], to_come)
        close(advantages[row, :n], torch.tensor(to_come) - values[row, :n])
    following = F.pad((values * mask)[:, 1:], (0, 1))
    close(losses.gae(rewards, values, mask, 0.9, 0.0)[0], (rewards + 0.9 * following - values) * mask)


# groups ---------------------------------------------------------------------------------------------------------------


def test_group_advantages():
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, 3.0, 5.0])  # three groups; standard deviations 0.5 sqrt 2, 0, sqrt 2
    half = 0.5**0.5
    close(losses.group_advantages(rewards, 2), [-half, half, 0, 0, -half, half], rtol=1e-5, atol=0)
    close(losses.group_advantages(torch.tensor([0, 1, 1, 0]), 2), [-half, half, half, -half], rtol=1e-5, atol=0)
    close(losses.group_advantages(torch.tensor([True, False]), 2), [half, -half], rtol=1e-5, atol=0)
    close(losses.group_advantages(rewards.repeat_interleave(2)[::2], 2), losses.group_advantages(rewards, 2))
    close(losses.group_advantages(torch.tensor([1.0, 2.0, 6.0]), 3), torch.tensor([-2.0, -1.0, 3.0]) / 7**0.5,
          rtol=1e-5, atol=0)


def test_dr_grpos_advantages():
    """Rewards minus means of 2 and 3; a group of large deviation counts more."""
    rewards = torch.tensor([1.0, 3.0, 0.0, 6.0])
    close(losses.group_advantages(rewards, 2, divide=False), [-1.0, 1.0, -3.0, 3.0])


def test_leave_one_out_advantages():
    """1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; n / (n - 1) times those of Dr. GRPO."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 1.0])
    expected = [-3.0, -1.5, 4.5, -0.5, -0.5, 1.0]
    close(losses.leave_one_out_advantages(rewards, 3), expected)
    close(1.5 * losses.group_advantages(rewards, 3, divide=False), expected)


def test_a_group_of_equals_gets_zero():
    """Exactly, where 0.1 + 0.1 + 0.1 is not 3 * 0.1, and eps would blow up what rounding leaves."""
    for reward in (0.1, 0.7, -1 / 3, 1e8):
        assert not losses.group_advantages(torch.full((21,), reward), 7).any()
        assert not losses.group_advantages(torch.full((21,), reward), 7, divide=False).any()
        assert not losses.leave_one_out_advantages(torch.full((21,), reward), 7).any()


@pytest.mark.parametrize('n, size', [(6, 4), (6, 1), (3, 0)])
def test_groups_that_are_none(n, size):
    with pytest.raises(ValueError, match=f'group_size={size} for {n} rewards'):
        losses.group_advantages(torch.zeros(n), size)


# clipped --------------------------------------------------------------------------------------------------------------

RATIOS, ADVANTAGES = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 0.9]]), torch.tensor([[1.0, -1, 2], [-1, 1, -2]])
ALL = torch.ones(2, 3)


def test_clipped_policy_loss_by_hand():
    old = torch.randn(2, 3)
    expected = torch.tensor([[-1.2, 0.8, -2.2], [1.5, -0.5, 1.8]])
    close(losses.clipped_policy_loss(old + RATIOS.log(), old, ADVANTAGES, ALL, 0.2), expected)


def test_clipped_policy_gradient():
    """None where the ratio has left the clip range in the advantage's direction; else -ratio A."""
    moved = torch.tensor([[True, True, False], [False, False, False]])
    slopes = gradient(lambda x: losses.clipped_policy_loss(x, torch.zeros(2, 3), ADVANTAGES, ALL, 0.2).mean(),
                      RATIOS.log().tolist())
    close(slopes, torch.where(moved, 0.0, -RATIOS * ADVANTAGES) / 6)


def test_is_clipped_by_hand():
    """Up with a positive advantage, down with a negative one; moves the other way are not clipped."""
    old = torch.randn(2, 3)
    clipped = losses.is_clipped(old + RATIOS.log(), old, ADVANTAGES, 0.2)
    assert clipped.tolist() == [[True, True, False], [False, False, False]]
    clipped = losses.is_clipped(old + RATIOS.log(), old, torch.tensor([[1.0], [0.0]]), 0.05)  # per sequence
    assert clipped.tolist() == [[True, False, True], [False, False, False]]


def test_policy_gradient_before_the_first_update():
    """Of the policy that drew the tokens it is REINFORCE's, -A grad log p; and one A per sequence."""
    advantages = torch.tensor([[2.0], [-1.0]])
    slopes = gradient(lambda x: losses.sequence_mean(
        losses.clipped_policy_loss(x, x.detach(), advantages, MASK, 0.2), MASK), [[-1.0] * 3, [-2.0] * 3])
    close(slopes, [[-0.5, -0.5, 0.0], [0.5, 0.0, 0.0]])  # half for each sequence, shared by its tokens


@pytest.mark.parametrize('algorithm', ['drgrpo', 'rloo'])
def test_the_expected_gradient_is_that_of_the_reward(algorithm):
    """Over all groups that a policy can draw, with their probabilities: neither way is biased.

    The policy ends an answer after token 0, or goes on with 0 or 1. GRPO as first published, with
    sequence-mean and the deviation, has another expectation.
    """
    answers = torch.tensor([[0, 0], [1, 0], [1, 1]])  # a token 0 at the start ends it
    mask, rewards = torch.tensor([[1, 0], [1, 1], [1, 1]]), torch.tensor([0.0, 1.0, 0.3])
    theta = torch.tensor([[0.2, -0.4], [0.1, 0.5]], requires_grad=True)

    def logprobs():
        return theta.log_softmax(dim=1)[torch.arange(2), answers]

    p = (logprobs() * mask).sum(dim=1).exp()
    expected, = torch.autograd.grad(-(p * rewards).sum(), theta)
    total, as_grpo = torch.zeros_like(theta), torch.zeros_like(theta)
    for group in itertools.product(range(3), repeat=3):
        group, logp = list(group), logprobs()
        if algorithm == 'rloo':
            advantages, scale = losses.leave_one_out_advantages(rewards[group], 3), 2
        else:  # the mean has the answer itself in it, which shrinks the gradient by 1 - 1/n
            advantages, scale = losses.group_advantages(rewards[group], 3, divide=False), 2 * 3 / 2
        old = logp[group].detach()
        for into, reduction, a in ((total, 'constant', advantages),
                                   (as_grpo, 'sequence-mean', losses.group_advantages(rewards[group], 3))):
            token_losses = losses.clipped_policy_loss(logp[group], old, a[:, None], mask[group], 0.2)
            loss = losses.reduce(token_losses, mask[group], reduction, 2)
            into += p[group].prod().item() * torch.autograd.grad(loss, theta, retain_graph=True)[0]
    close(scale * total, expected, rtol=1e-4, atol=1e-6)
    assert F.cosine_similarity(as_grpo.flatten(), expected.flatten(), dim=0) < 0.99


def test_clipped_value_loss():
    """Old values 0, clip 0.5: 0.8 towards 2 is clipped to 0.5; -0.8 away from 2 is not, nor is 0.4."""
    values, returns = [[0.8, -0.8, 0.4]], torch.tensor([[2.0, 2.0, 2.0]])
    old, mask = torch.zeros(1, 3), torch.ones(1, 3)
    loss = losses.clipped_value_loss(torch.tensor(values), old, returns, mask, 0.5)
    close(loss, (1.5**2 + 2.8**2 + 1.6**2) / 2 / 3)
    slopes = gradient(lambda x: losses.clipped_value_loss(x, old, returns, mask, 0.5), values)
    close(slopes, [[0.0, -2.8 / 3, -1.6 / 3]])
    close(losses.clipped_value_loss(torch.tensor(values), old, returns, torch.tensor([[0, 0, 1]]), 0.5), 1.6**2 / 2)
