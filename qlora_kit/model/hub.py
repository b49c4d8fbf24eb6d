"""Adapters to the Hugging Face Hub: ``LoraModel.push_to_hub``."""

from __future__ import annotations

import tempfile
from typing import Any


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **kwargs: Any,
) -> Any:
    """Save the adapters (never the base model) and upload them to a Hub repository, made if it isn't there."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, **kwargs)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            revision=revision,
            create_pr=create_pr,
        )
