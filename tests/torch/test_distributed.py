"""DistributedDataParallel and fully_shard (FSDP2): two processes with half a batch each get the
gradient that one process gets from the whole batch."""

import os
import warnings

import torch
import torch.distributed as dist
from networks import images, needs_kernels, unet
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

pytestmark = needs_kernels

WORLD = 2
BATCH = 6  # samples differ in magnitude, so that a wrong split or average shows


def _backward(network, x):
    network(x).square().sum().backward()


def _whole_batch(x):
    network = unet()
    _backward(network, x)
    return {name: p.grad for name, p in network.named_parameters()}


def _data_parallel():
    network = DistributedDataParallel(unet())
    return network, network.module


def _channels_last():
    """Gradients with other strides than their parameters' give a warning, which is an error
    here."""
    network = unet().to(memory_format=torch.channels_last)
    return DistributedDataParallel(network), network


def _sharded(**options):
    network = unet()
    for decoder in network.decoders:
        fully_shard(decoder, **options)
    fully_shard(network, **options)
    return network, network


def _sharded_in_bfloat16():
    return _sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


WAYS = {
    "DDP": (_data_parallel, 1e-5),
    "DDP, channels_last": (_channels_last, 1e-5),
    "FSDP2": (_sharded, 1e-5),
    "FSDP2 in bfloat16": (_sharded_in_bfloat16, 5e-2),
}


def _process(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*strides do not match")
    try:
        x = images(BATCH, 3, 16, 12)
        expected = _whole_batch(x)
        for way, (make, tolerance) in WAYS.items():
            network, inner = make()
            _backward(network, x.chunk(WORLD)[rank])
            for name, p in inner.named_parameters():
                got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                want = expected[name]
                assert got.dtype == want.dtype, f"{way}: {name} has {got.dtype}"
                # both average over the processes; here the sum over the batch is wanted
                error = (WORLD * got - want).norm() / want.norm()
                assert error < tolerance, f"{way}: {name} is off by {error:.2g}"
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Gloo's threads may still hold tensors while Python is taken down, which then aborts
    # (pytorch/pytorch, pull request 179291). All was compared: end without taking it down.
    os._exit(0)


def test_gradients_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=WORLD)
