import pytest

from kd_jax import config as config_module
from kd_jax.config import base
from kd_jax.config.data import Masking, Nlu, Source
from kd_jax.config.settings import Invalid, read
from kd_jax.types import UserError


def test_dict_round_trip_keeps_every_key_and_value():
    config = base.get_config()
    config.sources.generic = base.source("generic", "text", ("de", "en"), path="texts/{language}.txt")
    again = config_module.from_dict(config_module.to_dict(config))
    assert config_module.to_dict(again) == config_module.to_dict(config)
    assert again.sources.generic.languages == ("de", "en")


def test_fingerprint_ignores_key_order_and_sees_every_value():
    assert config_module.fingerprint({"a": 1, "b": [2]}) == config_module.fingerprint({"b": [2], "a": 1})
    assert config_module.fingerprint({"a": 1, "b": [2]}) != config_module.fingerprint({"a": 1, "b": [3]})


def test_differences_name_the_nested_key():
    old = {"distill": {"steps": 10, "temperature": 2.0}, "gone": 1}
    new = {"distill": {"steps": 20, "temperature": 2.0}, "fresh": 2}
    assert config_module.differences(old, new) == [
        "distill.steps: 10 -> 20",
        "fresh: (absent) -> 2",
        "gone: 1 -> (absent)",
    ]


def test_identity_leaves_out_what_a_resume_may_change():
    one = {"mesh": {"data": 8}, "distill": {"steps": 5, "accumulation": 2, "log_every": 1}, "seed": 0}
    assert config_module.identity(one) == {"distill": {"steps": 5}, "seed": 0}


def test_require_names_the_key_and_the_remedy():
    with pytest.raises(UserError, match=r"^config\.distill\.temperature: -1 is not positive; 2\.0 is usual$"):
        config_module.require(False, "distill.temperature", "-1 is not positive", "2.0 is usual")


@pytest.mark.parametrize("name", ["../de", "de/DE", "", ".de", "a b"])
def test_names_that_become_files_are_checked(name):
    for kind, changes in ((Nlu, {}), (Source, {"kind": "generic", "format": "text"})):
        field = "locales" if kind is Nlu else "languages"
        with pytest.raises(Invalid, match=rf"{field}: '{name}' cannot be part of a file name"):
            kind(**changes, **{field: ("de-DE", name)})
        kind(**changes, **{field: ("de-DE", "20231101.de")})


def test_several_names_in_one_string_get_a_hint_about_tuples():
    with pytest.raises(Invalid) as error:
        Nlu(locales=("en-US,es-ES",))
    assert error.value.remedy == """several are written as a tuple: "('en-US','es-ES')\""""
    with pytest.raises(Invalid) as error:
        Nlu(locales=("a/b",))
    assert "letters" in error.value.remedy


def test_an_unknown_key_is_refused_by_the_locked_config():
    config = base.get_config()
    config.lock()
    with pytest.raises((AttributeError, KeyError)):
        config.distill.temprature = 3.0


@pytest.mark.parametrize("key, value", [("seed", 2**31), ("seed", 10**400), ("watchdog_seconds", float("nan"))])
def test_non_finite_and_huge_numbers_are_refused_with_their_key(key, value):
    config = base.get_config()
    config[key] = value
    with pytest.raises(UserError, match=rf"^config\.{key}: .* is not finite or too large; give another number"):
        config_module.resolved(config, ("seed",))
    config = base.get_config()
    config.masking.rate = float("nan")
    with pytest.raises(UserError, match=r"^config\.masking\.rate: nan is not finite"):
        read(Masking, config.masking, "masking")
    assert config_module.resolved(base.get_config(), ("seed",))["seed"] == 0
