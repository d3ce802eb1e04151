"""The embedded source, whole and restricted to some domains."""

import numpy as np
import pytest

from fedra_engine.config import DataConfig
from fedra_engine.data.sources import load_source
from fedra_engine.errors import InputError


def test_digits_have_their_domains_and_classes() -> None:
    data = load_source(DataConfig(), seed=0)
    assert len(data.domains) == 6
    assert data.classes == [str(digit) for digit in range(10)]
    assert set(np.asarray(data.train["domain"])) == set(range(6))


def test_chosen_digits_domains_are_the_same_images_in_the_given_order() -> None:
    everything = load_source(DataConfig(), seed=0)
    chosen = [everything.domains[3], everything.domains[0]]
    data = load_source(DataConfig(domains=chosen), seed=0)
    assert data.domains == chosen
    for index, name in enumerate(chosen):
        expected = everything.test.filter(
            lambda domain, name=name: everything.domains[domain] == name, input_columns="domain"
        )
        found = data.test.filter(lambda domain, index=index: domain == index, input_columns="domain")
        assert found["label"][:] == expected["label"][:]
        assert [list(image.tobytes()) for image in found["image"]] == [
            list(image.tobytes()) for image in expected["image"]
        ]


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.domains: found 'marble', expected some of clean"):
        load_source(DataConfig(domains=["clean", "marble"]), seed=0)
