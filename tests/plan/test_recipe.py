from __future__ import annotations

import pytest

from windlass.errors import ConfigError
from windlass.plan.number import BFLOAT16, FLOAT16, FLOAT32, fixed
from windlass.plan.recipe import PRESETS, ROLES, Late, LayerFormat, Recipe, parse_recipe, spell_format

LINES = [
    "float32",
    "fixed16",
    "float16",
    "bfloat16",
    "fixed16,errors=<4,12>,rounding=nearest",
    "fixed16,error_scale=8,conv1.activations=<8,8>,fc*.weights=float16,late=0.5:+2,late=0.8:+4",
    "fixed16,exchange=16bit",
    "weights=<2,14>,updates=<2,14>",
    "bfloat16,weights=fixed(16,14,symmetric)",
    "fixed16,layer1.0.conv1.errors=float32",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_recipe_and_back(line: str) -> None:
    recipe = parse_recipe(line)
    assert str(recipe) == line and parse_recipe(str(recipe)) == recipe and parse_recipe(recipe) is recipe


@pytest.mark.parametrize(
    ("line", "canonical"),
    [
        (" fixed16 , errors = < 4 , 12 > ", "fixed16,errors=<4,12>"),
        ("fixed16,errors=fixed(16,12),errors=<2,14>", "fixed16"),
        ("float32,weights=<2,14>,gradients=<2,14>,errors=<2,14>,updates=<2,14>,activations=<6,10>", "fixed16"),
        ("fixed16,rounding=nearest,rounding=stochastic", "fixed16"),
        ("fixed16,late=0.80:4", "fixed16,late=0.8:+4"),
    ],
)
def test_there_is_one_way_to_write_it(line: str, canonical: str) -> None:
    assert str(parse_recipe(line)) == canonical


def test_the_presets_are_the_papers_and_the_usual_ones() -> None:
    for role in ROLES:
        assert PRESETS["fixed16"].number(role, "x") == fixed(16, 10 if role == "activations" else 14)
        assert PRESETS["float16"].number(role, "x") == FLOAT16 and PRESETS["bfloat16"].number(role, "x") == BFLOAT16
    assert PRESETS["float32"].is_plain and not PRESETS["fixed16"].is_plain
    assert not parse_recipe("c1.activations=<8,8>").is_plain


def test_the_last_pattern_that_matches_counts() -> None:
    recipe = parse_recipe("fixed16,c*.weights=<4,12>,c1.weights=<8,8>,c?.errors=float16")
    numbers = [recipe.number("weights", layer) for layer in ("c1", "c2", "f1")]
    assert numbers == [fixed(16, 8), fixed(16, 12), fixed(16, 14)]
    assert recipe.number("errors", "c1") == FLOAT16 and recipe.number("gradients", "c1") == fixed(16, 14)


def test_late_formats_have_more_fraction_bits() -> None:
    recipe = parse_recipe("fixed16,errors=float16,c1.weights=<1,7>,late=0.5:+2,late=0.8:+4")
    found = [recipe.number("weights", "x", share) for share in (0.0, 0.49, 0.5, 0.79, 0.8, 1.0)]
    assert found == [fixed(16, 14)] * 2 + [fixed(18, 16)] * 2 + [fixed(20, 18)] * 2
    assert recipe.number("weights", "c1", 0.9) == fixed(12, 11) and recipe.number("errors", "c1", 0.9) == FLOAT16


@pytest.mark.parametrize(
    ("line", "batch", "number"),
    [
        ("fixed16", 1, fixed(16, 14)),
        ("fixed16", 64, fixed(16, 20)),
        ("fixed16", 100, fixed(16, 21)),
        ("fixed16,error_scale=1", 64, fixed(16, 14)),
        ("fixed16,error_scale=4", 64, fixed(16, 16)),
        ("fixed16,errors=fixed(8,120)", 1 << 10, fixed(8, 126)),
        ("float16", 64, FLOAT16),
        ("float32", 64, FLOAT32),
    ],
)
def test_errors_are_those_of_a_samples_own_loss(line: str, batch: int, number: object) -> None:
    assert parse_recipe(line).error_number("c1", 0.0, batch) == number


def test_how_exact_convolutions_must_be() -> None:
    assert parse_recipe("fixed16").accuracy("exact") == ("exact", parse_recipe("fixed16").accuracy("exact")[1])
    found, why = parse_recipe("fixed16").accuracy("fast")
    assert found == "standard" and why.startswith("accuracy standard instead of fast")
    assert parse_recipe("bfloat16").accuracy("fast")[0] == "fast"
    late, plain = parse_recipe("fixed16,late=0.8:+4"), parse_recipe("fixed16")
    assert late.error_factor() == plain.error_factor() / 16
    assert parse_recipe("float32").error_factor() == float("inf")


def test_layers_that_are_not_there_are_refused() -> None:
    recipe = parse_recipe("fixed16,conv*.weights=<4,12>,fc.errors=<4,12>")
    recipe.check_layers(["conv1", "fc"])
    with pytest.raises(ConfigError, match=r"fc.errors=<4,12>: unknown layer 'fc'.*fc1"):
        recipe.check_layers(["conv1", "fc1"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "a number format is text such as 'fixed16'"),
        (16, "a number format is text such as 'fixed16'"),
        ("fixd16", "unknown recipe 'fixd16'.*fixed16"),
        ("fixed16,float16", "unknown recipe 'float16'"),
        ("fixed16,weight=<2,14>", "unknown role or setting 'weight'.*weights"),
        ("fixed16,c1.weight=<2,14>", "unknown role 'weight'.*weights"),
        ("fixed16,weights=<2;14>", "unknown number format '<2;14>'"),
        ("fixed16,weights=<20,14>", "WL of a fixed-point format is 1 to 24, got 34"),
        ("fixed16,weights=<-110,127>", "FL of a fixed-point format is -100 to 126, got 127"),
        ("fixed16,rounding=up", "unknown rounding 'up'"),
        ("fixed16,exchange=8bit", "unknown exchange '8bit'"),
        ("float32,exchange=16bit", "exchange=16bit: gradients are float32"),
        ("fixed16,error_scale=3", "error_scale: needs 'batch' or a power of two"),
        ("fixed16,error_scale=-2", "error_scale: needs 'batch' or a power of two"),
        ("fixed16,late=0.8", "late: needs SHARE:.BITS"),
        ("fixed16,late=1.5:+4", "late: needs growing shares"),
        ("fixed16,late=nan:+4", "late: needs growing shares"),
        ("fixed16,late=0.8:+4,late=0.5:+6", "late: needs growing shares"),
        ("fixed16,late=0.8:+0", "at least 1"),
        ("fixed16,late=0.8:+10", "WL of a fixed-point format is 1 to 24, got 26"),
        ("float16,late=0.8:+4", "late: adds fraction bits to fixed-point formats, and there is none"),
        ("fixed16,layers=3", "unknown role or setting 'layers'"),
        ("fixed16,.weights=<2,14>", "needs a layer"),
    ],
)
def test_bad_lines_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(line)


def test_recipes_made_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="unknown role 'biases'"):
        Recipe(layers=(LayerFormat("c1", "biases", FLOAT16),))
    assert Recipe(weights="<2,14>", late=(Late(0.5, 2),)).weights == fixed(16, 14)  # type: ignore[arg-type]
    assert spell_format(fixed(16, 14, symmetric=True)) == "fixed(16,14,symmetric)"
