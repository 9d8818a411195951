"""A merged model is not pushed into an adapter's repo, as it is not saved into its folder.

transformers saves what it pushes into a folder of its own, so that the method which a merged model
keeps sees no repo. What it hands that folder to is asked instead, for all models, and does what it
ever did for those that hf_lora did not merge.
"""

from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from hf_lora.errors import HubError
from hf_lora.files.other_kind import adapter_in
from hf_lora.hub.errors import file_names, writing
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.in_front import Original, patch_class
from hf_lora.integrations.save_merged import SaveMerged

_MODULE, _CLASS, _METHOD = "transformers.utils.hub", "PushToHubMixin", "_upload_modified_files"


def install() -> None:
    """Patch what transformers uploads with, now where it is imported, and else when it will be."""
    when_imported(_MODULE, _patch)


def _patch(module: Any) -> None:
    patch_class(module, _CLASS, {_METHOD: _upload}, "pushing merged models is unguarded")


def _upload(
    original: Original, model: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Upload, but not a merged model beside an adapter."""
    saver = vars(model).get("save_pretrained")
    if isinstance(getattr(saver, "function", None), SaveMerged):
        _check(repo_id, kwargs)
    return original(working_dir, repo_id, *args, **kwargs)


def _check(repo_id: str, options: dict[str, Any]) -> None:
    create_pr = bool(options.get("create_pr"))
    with writing(repo_id, create_pr):
        api = HfApi(token=options.get("token"))
        try:
            files = file_names(api.list_repo_files(repo_id, revision=options.get("revision")))
        except RevisionNotFoundError:  # a branch that the push makes
            return
    found = adapter_in(files)
    if found:
        raise HubError(
            f"{repo_id} holds an adapter ({', '.join(found)}). With a merged model beside it "
            "transformers would open the repo as that model plus the adapter, which is in it "
            "already. Push the merged model to another repo; nothing was pushed."
        )
