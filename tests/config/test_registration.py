"""Names and options that modules outside the package add to the configuration.

Each test has a process of its own: what is registered stays.
"""

import subprocess
import sys

from fedra_engine.config.methods import METHOD_NAMES
from fedra_engine.methods.registry import METHODS

BEGIN = """
import copy
import pickle
from dataclasses import asdict, dataclass, fields

import pytest

from fedra_engine.config import ExperimentConfig, MethodConfig, register_choice, register_method_options
from fedra_engine.studies.plan import differences
from fedra_engine.config.options import number, option
from fedra_engine.config.validation import validate
from fedra_engine.runtime.errors import InputError


@dataclass
class Mine:
    weight: float = option(0.5, number(0, 1))

earlier = ExperimentConfig()
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_configuration_names_the_methods_that_there_are() -> None:
    assert sorted(METHOD_NAMES.names) == sorted(METHODS)


def test_options_of_a_registered_method_are_fields_like_any_others() -> None:
    run("""
register_method_options("mine", Mine)
register_method_options("plain")
config = ExperimentConfig()
assert [field.name for field in fields(MethodConfig)][-2:] == ["lorafair", "mine"]
assert asdict(config)["method"]["mine"] == {"weight": 0.5}
assert config == earlier == copy.deepcopy(earlier) == pickle.loads(pickle.dumps(earlier))
assert MethodConfig("mine", mine=Mine(0.25)) != MethodConfig("mine")
config.method.name, config.method.mine.weight = "mine", 0.25
validate(config)
assert list(differences(config, earlier, ["method.name"])) == [("method.mine.weight", 0.25, 0.5)]
config.method.mine.weight = 2
with pytest.raises(InputError, match=r"^method\\.mine\\.weight: found 2, expected a number from 0 to 1$"):
    validate(config)
config.method.name, config.method.mine.weight = "plain", 0.25
with pytest.raises(InputError, match=r"found 0\\.25 with method\\.name plain, where it does nothing"):
    validate(config)
with pytest.raises(AttributeError, match="no field 'others'"):
    earlier.method.others
""")


def test_a_method_registers_once_and_takes_no_other_field() -> None:
    run("""
from fedra_engine.config import HetLoraConfig

register_method_options("hetlora", HetLoraConfig)
assert ExperimentConfig() == earlier
for name in ("name", "hetlora", "weighting"):
    with pytest.raises(InputError, match="expected a name that is free"):
        register_method_options(name, Mine)
""")


def test_a_registered_source_may_read_any_option_of_the_data() -> None:
    run("""
config = ExperimentConfig()
config.data.source = "shelf"
with pytest.raises(InputError, match=r"^data\\.source: found 'shelf', expected one of digits, "):
    validate(config)
register_choice("data.source", "shelf")
register_choice("data.partition", "by_height")
validate(config)
config.data.root, config.data.image_size, config.data.max_length = "here", 8, 9
config.data.partition, config.data.clients = "by_height", 3
validate(config)
config.data.source = "shelves"
with pytest.raises(InputError, match=r"expected one of digits, .*, shelf \\(did you mean shelf\\?\\)$"):
    validate(config)
""")
