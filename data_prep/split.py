"""Training or validation: decided by a document's group alone.

A group is what may not be cut, such as all notes of a subject, whatever files they are in. The
decision is a hash of the group, so it needs no list of groups, stays the same when documents are
added, and a larger share only moves groups from training to validation.
"""

from common.counter_random import derive_key

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


def split_of(group: str, validation_share: float, seed: int) -> str:
    """The split of a group; about `validation_share` (0 … 1) of all groups are for validation."""
    drawn = derive_key("split", seed, group) / 2.0**64
    return VALIDATION if drawn < validation_share else TRAIN
