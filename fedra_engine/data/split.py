"""A test set where a source brings none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedra_engine.runtime.randomness import generator


def stratified_test_set(
    domain_of: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    domains: Sequence[str],
    classes: Sequence[str],
    fraction: float,
    seed: int,
) -> NDArray[np.bool_]:
    """Hold out `fraction` of every class of every domain, at least one sample and never all of them.

    A class's draw depends on the seed, the names of its domain and class, and its number of samples alone.

    Args:
        domain_of: int64 [samples].
        labels: int64 [samples]; None takes each domain as one class.
        domains: their names.
        classes: their names.
        fraction: share of the samples, between 0 and 1.
        seed: of the experiment.

    Returns:
        bool [samples], whether a sample is held out.
    """
    is_test = np.zeros(len(domain_of), dtype=np.bool_)
    for domain, domain_name in enumerate(domains):
        rows = np.flatnonzero(domain_of == domain)
        of_class = np.zeros(len(rows), dtype=np.int64) if labels is None else labels[rows]
        for label in np.unique(of_class):
            members = rows[of_class == label]
            purpose = domain_name if labels is None else f"{domain_name}/{classes[label]}"
            rng = generator(seed, purpose=f"test split of {purpose}")
            held_out = min(max(round(fraction * len(members)), 1), len(members) - 1)
            is_test[members] = rng.permutation(len(members)) < held_out
    return is_test
