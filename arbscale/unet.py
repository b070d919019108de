"""The denoiser: a U-Net with time embedding and self-attention.

The layout is that of Dhariwal and Nichol 2021 in the form that latent diffusion (Rombach et al.
2022) uses: time is added inside each residual block, attention has heads of fixed width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from arbscale.coords import Size
from arbscale.store import STRAY, InputError


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of steps (B,) -> (B, dim): cosines, then sines, periods of 2 pi to 1e4 2 pi."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zeroed(layer: nn.Module) -> nn.Module:
    """Return a layer that adds nothing until it has learned, so that a network trains faster."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


PAIRS = 2**24  # query-key pairs per call up to which a CPU takes plain products in bfloat16


def attend(
    q: Tensor, k: Tensor, v: Tensor, grid: Size | None = None, window: int | None = None
) -> Tensor:
    """Let each position of a grid (h, w) read from all, or from those around it: (B, heads, N, D).

    Where a side is longer than `window`, the positions go in rectangles of at most two thirds of
    it, and each rectangle reads the `window` rows and columns around it. So the cost grows with N,
    and no position reads from farther than in a network that was trained on grids of that size.
    """
    if window is None or grid is None or max(grid) <= window:
        return _attend_to_all(q, k, v)
    q, k, v = (x.unflatten(2, grid) for x in (q, k, v))  # (B, heads, h, w, D)
    out = torch.empty_like(v)
    for rows, near_rows in _windows(grid[0], window):
        for columns, near_columns in _windows(grid[1], window):
            asked = q[:, :, rows, columns]
            near = (x[:, :, near_rows, near_columns].flatten(2, 3) for x in (k, v))
            found = _attend_to_all(asked.flatten(2, 3), *near)
            out[:, :, rows, columns] = found.unflatten(2, asked.shape[2:4])
    return out.flatten(2, 3)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let each of N positions read from all of M: (B, heads, N, D), (B, heads, M, D) twice."""
    bf16 = q.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if bf16 and q.shape[:-1].numel() * k.shape[-2] <= PAIRS:  # faster, but it holds all pairs
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _windows(n: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Cut n positions into even spans; yield each with the `window` positions around it."""
    count = 1 if n <= window else math.ceil(n / max(1, 2 * window // 3))
    edges = [round(i * n / count) for i in range(count + 1)]
    for start, stop in zip(edges, edges[1:], strict=False):
        first = max(0, min((start + stop - window) // 2, n - window))
        yield slice(start, stop), slice(first, min(n, first + window))


class ResidualBlock(nn.Module):
    """(B, in_channels, h, w) and time (B, time_dim) -> (B, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(32, out_channels)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Add the time between the two convolutions; starts as the identity (or `skip`)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out_channels, h, w)
        h = h + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head self-attention over all positions, (B, C, h, w) -> (B, C, h, w)."""

    window: int | None = None  # side of what a position reads, where it is not all

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        if channels % head_channels:
            found = f"{channels} and {head_channels}"
            raise InputError(f"attention's width is a multiple of head_channels, got {found}")
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Let every position read from every other one; `time` is not used."""
        h = self.norm(x).flatten(2).mT  # (B, h*w, C)
        q, k, v = self.qkv(h).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        h = attend(q, k, v, tuple(x.shape[-2:]), self.window)  # (B, heads, h*w, head_channels)
        h = self.out(h.transpose(1, 2).flatten(2))  # (B, h*w, C)
        return x + h.mT.reshape(x.shape)


class Stack(nn.ModuleList):
    """A residual block, with attention behind it where the level has it."""

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """Run the layers in order."""
        for layer in self:
            h = layer(h, time)
        return h


class UNet(nn.Module):
    """Predict the noise in a latent: (B, c, h, w), any h and w -> (B, c, h, w).

    Parameters
    ----------
    latent_channels
        c.
    condition_channels
        Channels of a condition that is concatenated to the noisy latent; 0 for none.
    channels
        Width of the first level. Take at least 64: with one channel per group, group normalisation
        removes what time has added, and the block is blind to t.
    multipliers
        Width of each level as a multiple of `channels`; between levels the size is halved.
    blocks
        Residual blocks per level on the way down; one more on the way up.
    attention_levels
        Levels with attention after each block; the middle has it always.
    head_channels
        Width of an attention head.
    middle
        `middle(channels, time_dim)` makes what runs between the ways down and up, called with
        activations (B, channels, h, w) and time (B, time_dim); None for the usual two residual
        blocks with attention between them.

    Attributes
    ----------
    checkpointing
        Keep no activation inside a block for the backward pass but compute them again: about a
        third more time for a fraction of the memory. False unless set.

    """

    def __init__(
        self,
        latent_channels: int,
        condition_channels: int = 0,
        channels: int = 64,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 2,
        attention_levels: tuple[int, ...] = (1,),
        head_channels: int = 32,
        middle: Callable[[int, int], nn.Module] | None = None,
    ):
        super().__init__()
        self.channels, self.condition_channels = channels, condition_channels
        self.checkpointing = False
        time_dim = 4 * channels
        widths = [channels * m for m in multipliers]

        def usual_middle(width: int, time_dim: int) -> Stack:
            first = ResidualBlock(width, width, time_dim)
            attention = Attention(width, head_channels)
            return Stack([first, attention, ResidualBlock(width, width, time_dim)])

        def stack(inside: int, out: int, level: int) -> Stack:
            attention = [Attention(out, head_channels)] if level in attention_levels else []
            return Stack([ResidualBlock(inside, out, time_dim), *attention])

        self.time = nn.Sequential(
            nn.Linear(channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.stem = nn.Conv2d(latent_channels + condition_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        for level, out in enumerate(widths):
            self.down.append(nn.ModuleList())
            for _ in range(blocks):
                self.down[level].append(stack(width, out, level))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = (middle or usual_middle)(width, time_dim)
        for level, out in reversed(list(enumerate(widths))):
            self.up.append(nn.ModuleList())
            for _ in range(blocks + 1):
                self.up[-1].append(stack(width + skips.pop(), out, level))
                width = out
            if level:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(32, width)
        self.conv = zeroed(nn.Conv2d(width, latent_channels, 3, padding=1))

    def forward(self, z_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the noise in scaled latents `z_t` (B, c, h, w) at integer steps `t` (B,).

        `condition` (B, condition_channels, h, w) is scaled, too; give it where the network was
        built for one, else ValueError.
        """
        h = with_condition(z_t, condition, self.condition_channels)
        time = self.time(timestep_embedding(t, self.channels).to(h))  # (B, time_dim)
        h = self.stem(h)  # (B, channels, h, w)
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = run(self, block, h, time)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)  # (B, width, ceil(h/2), ceil(w/2))
                skips.append(h)
        h = run(self, self.middle, h, time)
        for i, blocks in enumerate(self.up):
            for block in blocks:
                h = run(self, block, torch.cat([h, skips.pop()], dim=1), time)
            if i < len(self.grow):  # to the next skip's size: odd sizes come back exactly
                h = F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest")
                h = self.grow[i](h)
        return self.conv(F.silu(self.norm(h)))  # (B, c, h, w)


def limit_attention(network: nn.Module, window: int) -> None:
    """Give each attention in a network a `window` of so many latent pixels; see `attend`."""
    for module in network.modules():
        if hasattr(module, "window"):
            module.window = max(1, window)
    if isinstance(network, UNet):
        limit_attention(network.middle, window >> len(network.shrink))
        for level, parts in enumerate(zip(network.down, reversed(network.up), strict=True)):
            for part in parts:
                limit_attention(part, window >> level)


def launched() -> tuple[int, int]:
    """Return which process this is of how many that accelerate or torchrun launched together."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device() -> torch.device:
    """Return the fastest device there is: CUDA (of several processes to each its own), MPS, CPU."""
    if torch.cuda.is_available():
        own = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        return torch.device("cuda", own) if launched()[1] > 1 else torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return what networks compute in: bfloat16 for "auto" on a device made for it, else float32.

    Devices made for it are processors with AVX-512 BF16 or AMX, and GPUs from NVIDIA's Ampere on.
    ValueError for anything but "auto" and "float32".
    """
    if precision not in ("auto", "float32"):
        raise InputError(f"precision is 'auto' or 'float32', got {precision!r}")
    fast = {
        "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
    }
    has_it = precision == "auto" and fast.get(device.type, bool)()
    return torch.bfloat16 if has_it else torch.float32


def computing(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return a context in which networks compute in bfloat16, or for float32 as they would."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


class _Unfilled(TorchFunctionMode):
    """Leave tensors as they are where modules draw them: on the meta device that takes seconds."""

    def __torch_function__(self, func: Any, _: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return args[0] if func == Tensor.normal_ else func(*args, **(kwargs or {}))


def unfilled(build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """Build a network on the meta device, which allocates nothing; InputError where none can be."""
    try:
        with torch.device("meta"), _Unfilled():
            return build(*args)
    except (RuntimeError, ValueError, *STRAY) as error:
        raise InputError(f"no network has these sizes ({error})") from None


def with_condition(z_t: Tensor, condition: Tensor | None, channels: int) -> Tensor:
    """Join latents (B, c, h, w) and their condition, which a denoiser has `channels` of, or 0."""
    if (condition is None) != (channels == 0):
        need = f"{channels} channels of" if channels else "no"
        raise InputError(f"this denoiser takes {need} condition")
    return z_t if condition is None else torch.cat([z_t, condition], dim=1)


def run(network: nn.Module, block: nn.Module, *inputs: Tensor) -> Tensor:
    """Call a block; where the network has `checkpointing`, no activation inside is kept."""
    if network.checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
