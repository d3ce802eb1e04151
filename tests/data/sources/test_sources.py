"""The embedded source, whole and restricted to some domains."""

import numpy as np
import pytest

from fedra_engine.config import DataConfig
from fedra_engine.data.sources import load_source
from fedra_engine.runtime.errors import InputError


def test_digits_have_their_domains_and_classes() -> None:
    data = load_source(DataConfig(), seed=0)
    assert len(data.domains) == 6
    assert data.classes == [str(digit) for digit in range(10)]
    assert set(data.train.domain_of) == set(range(6))


def test_chosen_digits_domains_are_the_same_images_in_the_given_order() -> None:
    everything = load_source(DataConfig(), seed=0)
    chosen = [everything.domains[3], everything.domains[0]]
    data = load_source(DataConfig(domains=chosen), seed=0)
    assert data.domains == chosen
    for index, name in enumerate(chosen):
        test = everything.test
        expected = test.select(np.flatnonzero(test.domain_of == everything.domains.index(name)))
        found = data.test.select(np.flatnonzero(data.test.domain_of == index))
        assert found.labels.tolist() == expected.labels.tolist()
        assert [image.tobytes() for image in found.content["image"]] == [
            image.tobytes() for image in expected.content["image"]
        ]


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.domains: found 'marble', expected some of 'clean'"):
        load_source(DataConfig(domains=["clean", "marble"]), seed=0)
