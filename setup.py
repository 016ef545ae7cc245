"""Build the C++ data-order extension; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_smol._csrc",
            ["csrc/bindings.cpp", "csrc/blend.cpp", "csrc/minhash.cpp", "csrc/order.cpp"],
            depends=["csrc/blend.h", "csrc/minhash.h", "csrc/order.h", "csrc/spell.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=off"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
