"""
What reward.py and rl.py minimise, and what goes into it: pure functions of tensors.

Shapes: B sequences, T positions, V ids. A mask (B, T) of bools, or of 0 and 1, says which positions count: the tokens
that the model chose itself, not those of the prompt, nor padding, nor what a tool told it. A state is what stands
before such a token, an action is the token, and the state after the last one is the end, which is worth 0.
"""

import torch
from torch.nn import functional as F

from configurator import UserError

REDUCTIONS = ('token-mean', 'sequence-mean', 'none')

# Of a model ----------------------------------------------------------------------------------------------------------


def token_logprobs(logits, ids):
    """log softmax(logits)[id], in fp32. logits: (..., V), that from which each id was to be predicted. ids: (...)."""
    logits = logits.float()
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits):
    """-sum p log p of softmax(logits), in nats and fp32: (..., V) -> (...). Logits of -inf have no share in it."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def kl_estimates(logprobs, reference_logprobs):
    """
    Estimates of KL(policy || reference) at tokens that the policy drew, of the log-probabilities that the two give
    them: k1 = log(p/q), unbiased, often negative; k2 = log(p/q)^2 / 2, of low variance but biased; k3 = q/p - 1 -
    log(q/p), unbiased and never negative ("Approximating KL Divergence", Schulman 2020). -> (k1, k2, k3)

    The gradient of k3, which is GRPO's, is not that of the KL but near it where the two are close; that of k1, on
    average 0, is of no use in a loss.
    """
    log_ratio = reference_logprobs - logprobs
    return -log_ratio, log_ratio.square() / 2, log_ratio.exp() - 1 - log_ratio


# Averages over what counts -------------------------------------------------------------------------------------------


def masked_mean(x, mask, dim=None):
    """Mean of x where the mask is 1, over all or over one dimension; 0 where it is 1 nowhere."""
    counts = mask.to(x.dtype)
    x = torch.where(mask.bool(), x, 0.0)  # not x * mask: what does not count may be infinite
    total, n = (x.sum(), counts.sum()) if dim is None else (x.sum(dim), counts.sum(dim))
    return total / n.clamp(min=1)


def whiten(x, mask, eps=1e-8):
    """(x - mean) / sqrt(variance + eps), both over what the mask says (the variance divides by n); 0 elsewhere."""
    centred = x - masked_mean(x, mask)
    scale = (masked_mean(centred.square(), mask) + eps).rsqrt()
    return torch.where(mask.bool(), centred * scale, 0.0)


def reduced(losses, mask, reduction):
    """
    Losses of tokens, (B, T), as one. 'token-mean': each token weighs the same, in PPO, and DAPO's change to GRPO.
    'sequence-mean': each sequence does, whatever its length, as GRPO was published; one without tokens is left out.
    'none': (B, T), 0 where the mask is.
    """
    if reduction == 'token-mean':
        return masked_mean(losses, mask)
    if reduction == 'sequence-mean':
        return masked_mean(masked_mean(losses, mask, dim=1), mask.bool().any(dim=1))
    if reduction == 'none':
        return torch.where(mask.bool(), losses, 0.0)
    raise UserError(f'reduction={reduction!r}: expected {", ".join(map(repr, REDUCTIONS))}')


# Preferences ---------------------------------------------------------------------------------------------------------


def bradley_terry_loss(chosen, rejected, margin=None):
    """
    -log sigmoid(chosen - rejected - margin), of the scores (B,) of two answers to each prompt, of which people, or a
    rule, preferred the first -> (B,). After Bradley & Terry 1952, for language models in "Learning to Summarize from
    Human Feedback", Stiennon et al. 2020; the margin, (B,) or a number, says by how much ("Llama 2", Touvron et al.
    2023).
    """
    return -F.logsigmoid(chosen - rejected - (0.0 if margin is None else margin))


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing=0.0):
    """
    -log sigmoid(beta (log p/q (chosen) - log p/q (rejected))), p being the policy, q the reference: the Bradley-Terry
    loss of the reward that the policy is optimal for, beta log p/q ("Direct Preference Optimization", Rafailov et al.
    2023). label_smoothing: the share of pairs that are the wrong way round (cDPO, Mitchell 2023).

    All of them (B,), log-probabilities of whole answers, sums over their tokens.
    -> losses (B,), rewards of the chosen (B,), of the rejected (B,), the rewards without gradient
    """
    chosen, rejected = beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)
    losses = ((1 - label_smoothing) * bradley_terry_loss(chosen, rejected)
              + label_smoothing * bradley_terry_loss(rejected, chosen))
    return losses, chosen.detach(), rejected.detach()


def preferred(margins):
    """1 where the score of the chosen answer minus that of the rejected one is positive, 1/2 where it is 0, else 0."""
    return (margins.sign() + 1) / 2


# Policy gradients ----------------------------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma, lam):
    """
    Generalized advantage estimates: A_t = d_t + gamma lam A_t+1 with d_t = r_t + gamma V_t+1 - V_t, from one token that
    counts to the next, and V = A = 0 after the last ("High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", Schulman et al. 2016). lam=1: the rewards to come minus V; lam=0: d_t.

    rewards, values, mask: (B, T); values[t] is of the state before token t. -> advantages, returns (their sum with the
    values, which the values should be), (B, T) both, 0 where the mask is
    """
    rewards, mask = torch.where(mask.bool(), rewards, 0.0), mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        # what stands between two tokens that count, such as the output of a tool, takes no time
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_advantages(rewards, group_size, normalize_std=True, eps=1e-6):
    """
    GRPO's: rewards (N,), those of the group_size answers to a prompt side by side, -> (N,), each minus the mean of its
    group, divided by the group's standard deviation (n - 1) and eps ("DeepSeekMath", Shao et al. 2024). Without that
    division prompts that are nearly always, or hardly ever, answered rightly weigh no more than others ("Understanding
    R1-Zero-Like Training", Dr. GRPO, Liu et al. 2025). A group of equal rewards says nothing: exactly 0. Raises
    ValueError unless the groups are whole and of 2 or more.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise UserError(f'group_size={group_size} for {len(rewards)} rewards: expected whole groups of 2 or more')
    groups = rewards.reshape(-1, group_size)
    groups = groups if groups.is_floating_point() else groups.float()  # 0 or 1 of a checker
    groups = groups - groups[:, :1]  # so that equal ones are exactly 0, and so is their mean
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    return advantages.flatten()


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, clip_high=None, reduction='token-mean'):
    """
    PPO's -min(r A, clip(r, 1 - clip, 1 + clip_high) A), r = p / p_old: no gradient where the policy has moved by more
    than the clip already, in the direction that A asks for ("Proximal Policy Optimization Algorithms", Schulman et al.
    2017). clip_high: None for clip; above it rare tokens can rise faster ("DAPO", Yu et al. 2025).

    logprobs, old_logprobs, mask: (B, T), of the policy and of that which drew the tokens. advantages: (B, T), or (B, 1)
    for one of each sequence. reduction: see reduced().
    """
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return reduced(-torch.minimum(ratio * advantages, clipped * advantages), mask, reduction)


def is_clipped(logprobs, old_logprobs, advantages, clip=0.2, clip_high=None):
    """Where clipped_policy_loss() of the same has no gradient, the policy having moved by more than the clip: (B, T)"""
    ratio = (logprobs - old_logprobs).exp()
    has_risen = ratio > 1 + (clip if clip_high is None else clip_high)
    return has_risen & (advantages > 0) | (ratio < 1 - clip) & (advantages < 0)


def clipped_value_loss(values, old_values, returns, mask, clip):
    """
    PPO's loss of the value function, max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2, the mean over the tokens: no
    gradient where V has moved by more than the clip, towards R. values, old_values, returns, mask: (B, T).
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()) / 2, mask)
