"""Where settings come from, and how a bad one is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from vispa_graph.errors import SettingsError
from vispa_graph.settings import Settings, misspelt_variables


def test_an_explicit_setting_beats_the_environment_which_beats_the_default(monkeypatch):
    assert Settings().top_k == 6
    monkeypatch.setenv("VISPA_TOP_K", "4")
    assert Settings().top_k == 4
    assert Settings(top_k=3).top_k == 3


def test_the_environment_is_read_as_the_setting_s_own_type(monkeypatch, tmp_path):
    monkeypatch.setenv("VISPA_STRENGTH", "1.5")
    monkeypatch.setenv("VISPA_LAYERS", "[3, 4]")
    monkeypatch.setenv("VISPA_SHIPPED_VALUES", "false")
    monkeypatch.setenv("VISPA_CACHE", str(tmp_path))
    monkeypatch.setenv("VISPA_VALUES", '["mine", "ours"]')
    settings = Settings()
    assert settings.strength == 1.5
    assert settings.layers == (3, 4)
    assert settings.shipped_values is False
    assert settings.cache == tmp_path
    assert settings.values == (Path("mine"), Path("ours"))


def test_folders_of_values_may_be_joined_as_in_path(monkeypatch):
    monkeypatch.setenv("VISPA_VALUES", os.pathsep.join(["my values", "/ours"]))
    assert Settings().values == (Path("my values"), Path("/ours"))
    monkeypatch.setenv("VISPA_VALUES", f"/ours{os.pathsep}")
    assert Settings().values == (Path("/ours"),)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("2,3,4", (2, 3, 4)),
        ("10-12", (10, 11, 12)),
        ("7", (7,)),
        ("[3, 4]", (3, 4)),
        ("0.3-0.8", (0.3, 0.8)),
        ("0.5", (0.5, 0.5)),
        ("0.0-1.0", (0.0, 1.0)),
    ],
)
def test_layers_are_written_as_numbers_ranges_or_fractions(monkeypatch, text, layers):
    monkeypatch.setenv("VISPA_LAYERS", text)
    assert Settings().layers == Settings(layers=layers).layers == Settings(layers=text).layers == layers
    assert [type(layer) for layer in Settings().layers] == [type(layer) for layer in layers]


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("VISPA_TOP_K", "")
    assert Settings().top_k == 6


def test_the_cache_is_in_the_user_s_cache_folder_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("VISPA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Settings().cache == tmp_path / "vispa_graph"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Settings().cache == Path.home() / ".cache" / "vispa_graph"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0),
        ("strength", -101),
        ("positions", "prompt"),
        ("queue_size", 0),
        ("packed_gigabytes", -1),
        ("packed_gigabytes", float("inf")),
        ("timeout", 0),
        ("strength", float("nan")),
        ("target_probability", 1.0),
        ("target_probability", 0.0),
        ("temperature", "warm"),
        ("method", "guess"),
        ("dtype", "int8"),
        ("layers", ("first",)),
        ("max_new_tokens", 0),
        ("regularisation", 0),
        ("solver", "guess"),
        ("distribution", "votes"),
        ("option_orders", 0),
        ("model", ""),
        ("cache", None),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_with_its_meaning(name, value):
    with pytest.raises(SettingsError) as raised:
        Settings(**{name: value})
    assert f"{name}: " in str(raised.value)
    assert Settings.model_fields[name].description in str(raised.value)


def test_an_unknown_setting_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(SettingsError, match=r"topk: .*Known settings: model, .*top_k"):
        Settings(topk=3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TOP_K", "many"),
        ("LAYERS", "three"),
        ("LAYERS", "[3,"),
        ("VALUES", '["mine"'),
        ("LAYERS", "0.9-"),
        ("LAYERS", "3-1"),
        ("LAYERS", "2,,3"),
        ("STRENGTH", "-200"),
    ],
)
def test_a_malformed_variable_is_refused_like_a_malformed_argument(monkeypatch, name, text):
    monkeypatch.setenv(f"VISPA_{name}", text)
    with pytest.raises(SettingsError, match=name.lower()):
        Settings()


def test_a_bad_setting_is_laid_to_the_environment_only_where_it_came_from_there(monkeypatch):
    monkeypatch.setenv("VISPA_STRENGTH", "abc")
    with pytest.raises(SettingsError, match=r"^The settings cannot be used\. strength \(from VISPA_STRENGTH\): it should be a valid number\. \("):
        Settings()
    with pytest.raises(SettingsError, match=r"^The settings cannot be used\. strength: it should"):
        Settings(strength="def")
    monkeypatch.setenv("VISPA_LAYERS", "ten")
    with pytest.raises(SettingsError, match=r"layers \(from VISPA_LAYERS\): layers are numbers"):
        Settings(strength=1)


def test_a_variable_whose_name_is_nearly_ours_is_found_with_the_nearest_and_others_are_left_alone(monkeypatch):
    named = {"TOPK": "TOP_K", "LAYER": "LAYERS", "model_name": "MODEL", "MCPTOKEN": "MCP_TOKEN"}
    for name in (*named, "MCP_TOKEN", "TOP_K", "device", "XQZ"):
        monkeypatch.setenv(f"VISPA_{name}", "1")
    monkeypatch.setenv("VISPA_STRENGHT", "")
    monkeypatch.setenv("TOPK", "1")
    assert misspelt_variables() == {f"VISPA_{name}": f"VISPA_{known}" for name, known in named.items()}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_no_setting_s_own_variable_counts_as_misspelt(monkeypatch, name):
    monkeypatch.setenv(f"VISPA_{name.upper()}", "x")
    assert misspelt_variables() == {}


def test_a_library_is_silent_about_variables_that_are_not_its_own(monkeypatch, capfd, caplog):
    monkeypatch.setenv("VISPA_TOPK", "3")
    assert Settings().top_k == 6
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_all_problems_are_reported_at_once():
    with pytest.raises(SettingsError, match=r"strength: .*top_k: "):
        Settings(top_k=0, strength=-101)


def test_settings_cannot_be_changed():
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.top_k = 3
    assert settings.top_k == 6


def test_a_model_s_folder_may_be_given_as_a_path(tmp_path):
    assert Settings(model=tmp_path).model == str(tmp_path)
