"""The signatures of the public names: a change of one is a decision, and changes the snapshot.

``python -m tests.test_signatures`` writes the snapshot anew.
"""

import inspect
import json
from pathlib import Path

import hf_lora

SNAPSHOT = Path(__file__).parent / "signatures.json"


def signatures() -> dict[str, str]:
    """Return each public name's signature, without annotations; of a class its constructor's."""
    found = {}
    for name in hf_lora.__all__:
        value = getattr(hf_lora, name)
        if not callable(value):
            continue
        if isinstance(value, type) and issubclass(value, Exception):
            found[name] = " < ".join(base.__name__ for base in value.__mro__[1:])
        else:
            found[name] = str(_bare(inspect.signature(value)))
    return found


def _bare(signature: inspect.Signature) -> inspect.Signature:
    empty = inspect.Signature.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=empty)


def test_public_signatures_are_those_of_the_snapshot():
    assert signatures() == json.loads(SNAPSHOT.read_text())


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(signatures(), indent=1) + "\n")
