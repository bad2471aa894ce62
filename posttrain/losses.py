"""Compute post-training's losses and advantages, as pure functions of tensors.

Shapes: B sequences, T tokens, V ids. A mask (B, T), of bools or of 0 and 1, marks the actions: the
tokens that the model chose itself, not prompt, padding or the output of a tool. The state of an
action is the text before it. The state after the last action is worth 0.
"""

import torch
from torch.nn import functional as F

from configurator import UserError


def token_logprobs(logits, ids):
    """Return log softmax(logits) at `ids`, in fp32. logits: (..., V); ids: (...)."""
    return F.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None]).squeeze(-1)


def entropy(logits):
    """Return the entropy of softmax(logits) in nats, in fp32: (..., V) -> (...)."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def kl_estimates(logprobs, reference_logprobs):
    """Estimate KL(policy || reference) at tokens that the policy drew; -> (k1, k3).

    k1 = log(p/q) is unbiased but often negative; k3 = q/p - 1 - log(q/p) is unbiased and never
    negative ("Approximating KL Divergence", Schulman 2020). GRPO minimizes k3, whose gradient is
    close to that of the KL where p is close to q. The gradient of k1 has mean 0: no use in a loss.
    """
    log_ratio = reference_logprobs - logprobs
    return -log_ratio, log_ratio.exp() - 1 - log_ratio


# Means over a mask --------------------------------------------------------------------------------

def masked_mean(x, mask, dim=None):
    """Return the mean of x over the mask, overall or along `dim`; 0 if it is empty."""
    counts = mask.to(x.dtype)
    x = torch.where(mask.bool(), x, 0.0)  # not x * mask: x may be infinite outside the mask
    total, n = (x.sum(), counts.sum()) if dim is None else (x.sum(dim), counts.sum(dim))
    return total / n.clamp(min=1)


def sequence_mean(x, mask):
    """Return the mean of the sequences' means. A sequence without actions is left out."""
    return masked_mean(masked_mean(x, mask, dim=1), mask.bool().any(dim=1))


def reduce(x, mask, reduction, length):
    """Return the mean of x over the mask, in one of three ways.

    sequence-mean: every sequence counts the same (GRPO). token-mean: every token does (DAPO, Yu et
    al. 2025). constant: the sum over B * length. That length is the same for all answers, so a
    wrong one gains nothing by being long (Dr. GRPO, "Understanding R1-Zero-Like Training", Liu et
    al. 2025).
    """
    if reduction == 'constant':
        return torch.where(mask.bool(), x, 0.0).sum() / (len(x) * length)
    return {'sequence-mean': sequence_mean, 'token-mean': masked_mean}[reduction](x, mask)


def whiten(x, mask, eps=1e-8):
    """Return (x - mean) / sqrt(variance + eps), both over the mask; 0 elsewhere."""
    centred = x - masked_mean(x, mask)
    scale = (masked_mean(centred.square(), mask) + eps).rsqrt()
    return torch.where(mask.bool(), centred * scale, 0.0)


# Preferences --------------------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected):
    """Return -log sigmoid(chosen - rejected), of the scores (B,) of two answers.

    The model is Bradley & Terry's (1952); for language models see "Learning to Summarize from Human
    Feedback", Stiennon et al. 2020.
    """
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(policy, reference, beta, label_smoothing=0.0):
    """Return DPO's losses and the implicit rewards of chosen and rejected answers.

    policy, reference: (chosen, rejected), log-probabilities (B,) of whole answers. The implicit
    reward of an answer is beta * log(policy / reference), and the loss is Bradley-Terry's ("Direct
    Preference Optimization", Rafailov et al. 2023). label_smoothing: the assumed share of pairs
    whose labels are swapped (cDPO, Mitchell 2023). -> three tensors (B,), rewards without gradient.
    """
    chosen, rejected = (beta * (p - q) for p, q in zip(policy, reference, strict=True))
    losses = ((1 - label_smoothing) * bradley_terry_loss(chosen, rejected)
              + label_smoothing * bradley_terry_loss(rejected, chosen))
    return losses, chosen.detach(), rejected.detach()


def preferred(margins):
    """Return 1 where the chosen answer has the higher score, 1/2 at a tie, else 0."""
    return (margins.sign() + 1) / 2


# Policy gradients ---------------------------------------------------------------------------------

def gae(rewards, values, mask, gamma, lam):
    """Return generalized advantage estimates and returns, (B, T), 0 outside the mask.

    A_t = d_t + gamma lam A_t+1 with d_t = r_t + gamma V_t+1 - V_t, from one action to the next
    ("High-Dimensional Continuous Control Using Generalized Advantage Estimation", Schulman et al.
    2016). lam=1: the rewards to come minus V; lam=0: d_t. The returns, advantages + values, are
    the targets of the value function. values[t]: of the state before token t.
    """
    rewards, mask = torch.where(mask.bool(), rewards, 0.0), mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        # tokens between two actions, such as the output of a tool, take no time
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def in_groups(rewards, group_size):
    """Return rewards as (number of groups, group_size), up to a constant of each group.

    rewards: (N,), the group_size answers to a prompt side by side. Equal rewards become exactly 0.
    Raises UserError unless the groups are whole and of 2 answers or more.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise UserError(f'group_size={group_size} for {len(rewards)} rewards: expected whole '
                        f'groups of 2 or more')
    groups = rewards.reshape(-1, group_size)
    groups = groups if groups.is_floating_point() else groups.float()  # 0 or 1 of a checker
    return groups - groups[:, :1]


def group_advantages(rewards, group_size, divide=True, eps=1e-6):
    """Return GRPO's advantages (N,), (reward - mean) / (deviation + eps) of each group.

    The deviation divides by n - 1 ("DeepSeekMath", Shao et al. 2024). divide: False for Dr. GRPO's,
    reward - mean. rewards, group_size: see in_groups().
    """
    groups = in_groups(rewards, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if divide:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    return advantages.flatten()


def leave_one_out_advantages(rewards, group_size):
    """Return REINFORCE's advantages (N,), each reward minus the mean of the others in its group.

    That mean does not depend on the answer itself, so the gradient has no bias ("Buy 4 REINFORCE
    Samples, Get a Baseline for Free!", Kool et al. 2019; RLOO, "Back to Basics", Ahmadian et al.
    2024). rewards, group_size: see in_groups().
    """
    groups = in_groups(rewards, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Return PPO's loss of each token, -min(r A, clip(r, 1 +- clip) A), r = p / p_old.

    It has no gradient where r has left the clip range in the direction of A ("Proximal Policy
    Optimization Algorithms", Schulman et al. 2017). old_logprobs: of the policy that drew the
    tokens. logprobs, old_logprobs, mask: (B, T). advantages: (B, T), or (B, 1) per sequence.
    """
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def is_clipped(logprobs, old_logprobs, advantages, clip):
    """Return where clipped_policy_loss() has no gradient because of the clip, (B, T)."""
    ratio = (logprobs - old_logprobs).exp()
    return (ratio > 1 + clip) & (advantages > 0) | (ratio < 1 - clip) & (advantages < 0)


def clipped_value_loss(values, old_values, returns, mask, clip):
    """Return PPO's loss of values, max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2.

    It has no gradient where V has left the clip range in the direction of R. All but clip: (B, T).
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return masked_mean(errors / 2, mask)
