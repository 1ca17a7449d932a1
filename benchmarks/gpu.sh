#!/usr/bin/env bash
# How fast a GPU encodes with vidpipe's VAEs: AutoencoderKL as large as Stable Diffusion's and
# AutoencoderKLWan as large as Wan 2.1's, with random weights, so nothing is downloaded.
#
# Needs an NVIDIA driver, this checkout, and Python 3.11 or newer with a few wheels:
#
#   python3 -m venv .gpu && .gpu/bin/pip install "torch>=2.13" diffusers safetensors numpy \
#       pyarrow "pydantic>=2" fsspec click rich av
#   PYTHON=.gpu/bin/python benchmarks/gpu.sh                       # all of it: gpu.json and a table
#   PYTHON=.gpu/bin/python benchmarks/gpu.sh --only sd --seconds 5 # a part, quicker
#   benchmarks/gpu.sh --smoke                                      # tiny VAEs, on any machine
#
# Further options: benchmarks/gpu.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
