"""Reinforcement learning in 16-mixed: how far the trained policy is from the half-precision copy that rolls out.

    python examples/rl_float16.py               # minutes on a CPU, a table at the end
    python examples/rl_float16.py --tiny        # seconds

Needs precision-core alone.

A policy is trained in mixed precision; a copy in pure half precision, as inference engines run it, writes the episodes.
Both give each token a probability, which would be equal if numbers were exact. What they differ by makes every update a
little off-policy. float16 has three more bits for this than bfloat16 (arXiv 2510.26788); what it wants in return is a
loss scale, which 16-mixed has. This trains a policy in each format and prints mean |log p(trainer) - log p(rollout)|.

The task: write digits so that each is the one before plus one. The reward is the share of steps that are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from precision_core import Fabric

DIGITS, LENGTH = 10, 12


class Policy(nn.Module):
    """Digits so far (batch, position) -> the logits of the next one, by a small transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(DIGITS, width), nn.Embedding(LENGTH, width)
        self.up = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, DIGITS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        past = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]  # attention to all alike
        x = torch.cat([x, past], dim=-1)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(self.norm(x))


@torch.no_grad()
def roll_out(policy: nn.Module, episodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns sampled digits (episode, LENGTH + 1) that begin with random ones, and the log p the policy gave them."""
    ids, chances = torch.randint(DIGITS, (episodes, 1), device=device), []
    for _ in range(LENGTH):
        log_p = policy(ids)[:, -1].log_softmax(-1)
        ids = torch.cat([ids, torch.multinomial(log_p.exp(), 1)], dim=1)
        chances.append(log_p.gather(1, ids[:, -1:]))
    return ids, torch.cat(chances, dim=1)


def log_p_of(policy: nn.Module, ids: Tensor) -> Tensor:
    return policy(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


def train(fmt: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains under FMT-mixed with episodes of a copy in FMT-true; `fmt` is "16" or "bf16"."""
    trainer = Fabric(args.accelerator, precision=f"{fmt}-mixed")
    inference = Fabric(args.accelerator, precision=f"{fmt}-true")
    trainer.seed_everything(0)
    policy, rollout = Policy(args.width), Policy(args.width)
    policy, optimizer = trainer.setup(policy, torch.optim.AdamW(policy.parameters(), lr=3e-3, eps=1e-6))
    rollout = inference.setup_module(rollout).eval()
    gaps, rewards = [], []
    for _ in range(args.steps):
        rollout.load_state_dict(policy.state_dict())  # casts: this is how weights reach an inference engine
        ids, old = roll_out(rollout, args.episodes, trainer.device)
        right = (ids[:, 1:] == (ids[:, :-1] + 1) % DIGITS).float()
        log_p = log_p_of(policy, ids)
        with torch.no_grad():
            difference = log_p - old
            gaps.append(difference.abs().mean().item())
            ratio = difference.exp().clamp(max=2.0)  # importance of each token: 1, but for what rounding did
        optimizer.zero_grad()
        loss = -(ratio * (right - right.mean()) * log_p).mean()
        trainer.backward(loss)  # scaled under 16-mixed
        trainer.clip_gradients(policy, optimizer, max_norm=1.0)  # the norm of unscaled gradients
        optimizer.step()
        rewards.append(right.mean().item())
    late = max(1, args.steps // 5)
    plugin = trainer.precision_plugin
    result = {"first": rewards[0], "reward": sum(rewards[-late:]) / late, "gap": sum(gaps) / len(gaps)}
    print(
        f"{fmt:>4}-mixed, rollout in {fmt}-true: reward {result['first']:.3f} -> {result['reward']:.3f}, "
        f"mean |delta log p| {result['gap']:.2e}, {plugin.skipped_steps} steps skipped, scale {plugin.scale:.0f}"
    )
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Trainer and rollout in float16 and in bfloat16.")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="a small policy, few steps, on the CPU")
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.episodes, args.width, args.accelerator = 50, 32, 16, "cpu"
    results = {fmt: train(fmt, args) for fmt in ("16", "bf16")}
    print(f"bfloat16's difference is {results['bf16']['gap'] / results['16']['gap']:.1f} times float16's")
    return results


if __name__ == "__main__":
    main()
