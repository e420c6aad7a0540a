#!/bin/bash
# Download what gpu_check.py needs on a GPU machine without network that has PyTorch, pytest and NumPy, in the versions that
# are installed here: bash benchmarks/gpu_wheels.sh FOLDER [PYTHON_VERSION_OF_THAT_MACHINE]
set -e
folder=${1:?"usage: gpu_wheels.sh FOLDER [PYTHON_VERSION]"} version=${2:-3.12}
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
for package in mujoco mujoco-core gymnasium farama-notifications stable-baselines3; do
    installed=$(python -c "from importlib.metadata import version; print(version('$package'))")
    python -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" \
        -d "$folder" "$package==$installed"
done
du -sh "$folder"
