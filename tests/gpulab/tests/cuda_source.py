"""Compile CUDA C++ for the tests (skips them when nvcc is missing)."""

import shutil

import gpulab
import pytest


def cuda_module(source, arch=80, options=()):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    return gpulab.Module(gpulab.nvcc_ptx(source, arch, options))
