"""A GPU that is only pretended: what runs on it has shapes but no memory, and is counted.

    with pretended_gpu(), Count(meter):
        model.to(GPU)(x.to(GPU))

torch's meta device plays the GPU. Its tensors know shape and dtype alone, so that a model of any
size runs on any machine, backward too. Two things are added to it. Attention is the fused kernel
that CUDA would choose. And small tensors keep their values beside them (`known`), computed on the
CPU: token ids, masks, positions and sizes, by which pipelines decide what to do. What is read of an
unknown value is a stand-in: numbers are 1, pictures black, and any two tensors are equal.
"""

import math
import time
import weakref
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch._meta_registrations  # noqa: F401  gives meta tensors CUDA's fused attention
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
GPU = torch.device("meta")
CPU = torch.device("cpu")
SMALL = 2**16  # a tensor of so many numbers keeps its values
# What is read of tensors whose values nobody knows.
STAND_INS = {aten._local_scalar_dense.default: 1, aten.equal.default: True}

# ---------------------------------------------------------------- the pretended GPU


def is_on_gpu(leaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def on_cpu(leaf):
    """In place of a tensor of the GPU its known values, in place of its name the CPU's."""
    if is_on_gpu(leaf):
        return leaf.known
    return CPU if leaf == GPU else leaf


class PretendedGPU(TorchDispatchMode):
    """Sees every operation below autograd, and lets those of the CPU be."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if is_on_gpu(leaf)]
        named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        target = named[0] if named else None  # where the result is to lie
        if not inputs and target != GPU:
            return func(*args, **kwargs)
        if inputs and all(hasattr(leaf, "known") for leaf in inputs):
            return compute(func, args, kwargs, inputs, target or GPU)
        if func in STAND_INS:
            return STAND_INS[func]
        if target == CPU:
            return download(args[0], kwargs.get("dtype"))
        if func is aten.index.Tensor:
            args = (args[0], without_masks(args[1]))
        out = func(*args, **kwargs)
        if not inputs and out.numel() <= SMALL:  # newly made, or copied from the CPU
            out.known = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        return out


def compute(func, args, kwargs, inputs, device):
    """An operation on known values: what comes out is known as well."""
    values = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    changed = {id(leaf.known): leaf for leaf in inputs}  # by operations that work in place

    def label(value):
        if not isinstance(value, Tensor) or device == CPU:
            return value
        if id(value) in changed:
            return changed[id(value)]
        out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        if value.numel() <= SMALL:
            out.known = value
        return out

    return tree_map(label, values)


def download(tensor, dtype):
    """A tensor's copy on the CPU. A parameter's is never read, and memory never touched is free."""
    make = torch.empty if isinstance(tensor, nn.Parameter) else torch.zeros
    return make(tensor.shape, dtype=dtype or tensor.dtype)


def without_masks(indices):
    """Indices with the places where a mask is True instead of the mask, whose length none knows."""
    places = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            places.append(index)
        else:
            places += [place.to(GPU) for place in on_cpu(index).nonzero(as_tuple=True)]
    return places


attention = F.scaled_dot_product_attention
make_tensor = torch.tensor


def fused_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch's attention by the kernel that CUDA would choose; meta would build the score matrix."""
    if not query.is_meta:
        return attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        copies = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(copies, 1)
        value = value.repeat_interleave(copies, 1)
    if attn_mask is None and query.dtype == torch.bfloat16 and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    bias = attn_mask
    if bias is not None:
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def tensor_of(data, *args, device=None, **kwargs):
    """torch.tensor, whose values would be lost on their way to the GPU."""
    data = tree_map(lambda leaf: leaf.item() if is_on_gpu(leaf) else leaf, data)
    return make_tensor(data, *args, **kwargs).to(device)


@contextmanager
def pretended_gpu():
    """Within, tensors of the device GPU work as those of a real one would, without memory."""
    with ExitStack() as stack:
        # Not modes: those are off while backward computes a forward again.
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", fused_attention))
        stack.enter_context(patch.object(torch, "tensor", tensor_of))
        stack.enter_context(PretendedGPU())
        yield


# ---------------------------------------------------------------- the count


@dataclass
class Figures:
    """What a phase cost."""

    flops: Counter = field(default_factory=Counter)  # dtype -> operations, a multiply-add is two
    copied: int = 0  # bytes from one device to another
    peak: int = 0  # bytes that lived on the device at once
    seconds: float = 0.0


class Meter:
    """Figures by phase: at any moment one phase runs, an inner one instead of the outer."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.figures = defaultdict(Figures)
        self.phase = "loading"
        self.since = time.time()
        self.live = 0  # bytes, where a Count keeps account
        self.limit = math.inf  # bytes that the device has; above them a Count has memory run out

    @contextmanager
    def within(self, phase):
        outer = self.phase
        self.switch(phase)
        yield
        self.switch(outer)

    def switch(self, phase):
        """Ends the running phase and begins another."""
        peak = self.live
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        now = time.time()
        ended = self.figures[self.phase]
        ended.peak = max(ended.peak, peak)
        ended.seconds += now - self.since
        self.phase = phase
        self.since = now


class Count(TorchDispatchMode):
    """Adds FLOPs, copies and peak memory to a meter's running phase; on the CPU as well."""

    def __init__(self, meter):
        super().__init__()
        self.meter = meter
        self.seen = weakref.WeakSet()  # storages that live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        now = self.meter.figures[self.meter.phase]
        formula = flop_registry.get(func._overloadpacket)  # torch's own
        if formula:
            now.flops[args[0].dtype] += formula(*args, **kwargs, out_val=out)
        if func is aten._to_copy.default and out.device != args[0].device:
            now.copied += out.nbytes
        if func is aten.copy_.default and out.device != args[1].device:
            now.copied += out.nbytes
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.meter.device.type:
                self.track(leaf.untyped_storage())
        now.peak = max(now.peak, self.meter.live)
        return out

    def track(self, storage):
        """Counts a storage until nobody holds it, autograd included."""
        if storage not in self.seen:
            self.seen.add(storage)
            self.meter.live += storage.nbytes()
            weakref.finalize(storage, self.forget, storage.nbytes())
            if self.meter.live > self.meter.limit:
                raise torch.OutOfMemoryError(f"{self.meter.live / 1e9:.1f} GB of a pretended GPU")

    def forget(self, size):
        self.meter.live -= size
