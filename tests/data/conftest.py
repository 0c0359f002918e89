"""Shared by the tests of data: caches of their own, and loader workers that start quickly."""

import multiprocessing

import datasets
import pytest
from torch.utils.data import DataLoader

import lacuna.data.loader

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["lacuna.data.loader"])


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # it asks a server, for local files too


@pytest.fixture
def quick_workers(monkeypatch):
    """Workers come from a server that has imported torch already: they get everything pickled, as spawned ones do."""

    def loader(*args, **kwargs):
        if "multiprocessing_context" in kwargs:
            kwargs["multiprocessing_context"] = FORKSERVER
        return DataLoader(*args, **kwargs)

    monkeypatch.setattr(lacuna.data.loader, "DataLoader", loader)
