"""The command that trains networks, on few digits and a ResNet of one block a stage."""

import json
import shutil
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the networks need flax, of the extra `networks`")

from dufm_jax import Decay, Problem, data, dufm
from dufm_jax.networks import runs
from experiments import dufm_figure, network_training, records

TINY = {
    "blocks": 1,
    "samples_per_class": 5,
    "batch_size": 10,
    "num_epochs": 4,
    "warmup_epochs": 1,
    "measure_every": 2,
    "depth": 3,
    "num_seeds": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed, and its rows."""
    config = network_training.Config(out=str(tmp_path_factory.mktemp("whole")), **TINY)
    return config, network_training.run(config)


def _lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / records.METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_files_rows_and_figure(finished):
    config, rows = finished
    folder = Path(config.out)
    assert [row["seed"] for row in rows] == [0, 1]
    assert [line["epoch"] for line in _lines(folder)] == [0, 2, 4]
    assert [line["step"] for line in _lines(folder)] == [0, 10, 20]
    recorded = records.read_config(folder)
    assert (recorded["samples"], recorded["image_shape"], recorded["notice"]) == (50, [8, 8, 1], "")
    arrays = records.read_arrays(folder)
    for index, row in enumerate(rows):
        assert float(arrays.fit[index, -1]) == pytest.approx(row["fit"])
        assert row["loss"] == pytest.approx(row["fit"] + row["regularisation"])
        for layer in (1, 2, 3):
            values = arrays.singular_values.sel(layer=layer)[index].values
            assert row[f"rank_{layer}"] == np.sum(values > config.rank_tolerance * values[0])
            for name in ("dnc1", "cdnv", "condition_number", "rank"):
                curve = arrays[name].sel(run=index, layer=layer)
                assert float(curve[-1]) == pytest.approx(row[f"{name}_{layer}"])
    np.testing.assert_allclose(arrays.gram_recorded[:, -1], arrays.gram)
    np.testing.assert_allclose(arrays.singular_values_recorded[:, -1], arrays.singular_values)
    assert arrays.gram_recorded.shape == (2, 3, 3, 10, 10)
    assert dufm_figure.draw(folder).read_bytes().startswith(b"\x89PNG")


def test_a_head_narrower_than_the_classes(tmp_path):
    flags = TINY | {"width": 4, "num_seeds": 1, "num_epochs": 2}
    config = network_training.Config(out=str(tmp_path), **flags)
    (row,) = network_training.run(config)
    assert row["rank_2"] <= 4
    arrays = records.read_arrays(tmp_path)
    assert arrays.singular_values.shape == (1, 3, 10)
    assert (arrays.singular_values.sel(layer=1) > 0).all()
    np.testing.assert_array_equal(arrays.singular_values[:, 1:, 4:], 0)
    np.testing.assert_array_equal(arrays.singular_values_before[:, :, 4:], 0)
    assert dufm_figure.draw(tmp_path).exists()


def test_the_loss_is_equation_1_on_the_features_of_all_images(finished):
    config, _ = finished
    images = network_training.load(config)
    recipe = config.recipe(images)
    pixels, _ = data.standardise(images.images)
    state = runs.start(recipe, config.grid.seed, pixels.shape[1:], config.strengths)
    measured = network_training.measure(
        recipe, state, config.strengths, pixels, images.labels, config.rank_tolerance
    )
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), state.params)
    _, activations, _ = recipe.classifier.apply(variables, jnp.asarray(pixels), train=False)
    params = recipe.classifier.head_params(variables, activations.after[0])
    problem = Problem(10, 5, config.widths)
    decay = Decay(jnp.asarray(config.features_decay), jnp.full(3, config.weight_decay[0]))
    fit, regularisation = dufm.loss_terms(params, problem, decay)
    assert measured[0].fit == pytest.approx(float(fit), rel=1e-5)
    assert measured[0].regularisation == pytest.approx(float(regularisation), rel=1e-5)

    logits, _, _ = recipe.classifier.apply(variables, jnp.asarray(pixels), train=False)
    last = np.asarray(activations.after[-1], np.float64)
    means = np.stack([last[images.labels == label].mean(0) for label in range(10)])
    distances = np.linalg.norm(last[:, None] - means, axis=2)
    agreeing = np.argmin(distances, axis=1) == np.argmax(np.asarray(logits), axis=1)
    assert measured[0].nearest_centre == np.mean(agreeing)
    weights = np.asarray(variables.params["head"]["W_3"], np.float64)
    apart = weights / np.linalg.norm(weights) - means / np.linalg.norm(means)
    assert measured[0].self_duality == pytest.approx(np.linalg.norm(apart))


def test_resumed_is_uninterrupted(finished, tmp_path, monkeypatch):
    whole, _ = finished
    config = network_training.Config(out=str(tmp_path / "cut"), checkpoint_seconds=0.0, **TINY)
    train_epoch = runs.train_epoch

    def interrupted(recipe, state, strengths, seeds, epoch, *rest, **options):
        if epoch == 3:
            raise KeyboardInterrupt
        return train_epoch(recipe, state, strengths, seeds, epoch, *rest, **options)

    monkeypatch.setattr(runs, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        network_training.run(config)
    monkeypatch.setattr(runs, "train_epoch", train_epoch)
    folder = Path(config.out)
    # A line beyond the checkpoint, cut off: what a kill between the two may leave.
    with (folder / records.METRICS).open("a") as file:
        file.write('{"epoch": 4, "fit": [0.')
    network_training.run(network_training.Config(out=config.out, resume=True, **TINY))
    assert _lines(folder) == _lines(Path(whole.out))
    for name in (records.RUNS, records.RESULTS):
        assert (folder / name).read_bytes() == (Path(whole.out) / name).read_bytes()


def test_what_cannot_be_resumed_is_refused(finished):
    whole, _ = finished
    with pytest.raises(ValueError, match="num_epochs=4, not 6") as error:
        network_training.run(
            network_training.Config(out=whole.out, resume=True, **(TINY | {"num_epochs": 6}))
        )
    cases.assert_one_sentence(str(error.value))


def test_other_images_are_not_gone_on_with(finished, monkeypatch):
    whole, _ = finished
    load = network_training.load

    def brighter(config):
        images = load(config)
        return images._replace(images=images.images // 2)

    monkeypatch.setattr(network_training, "load", brighter)
    with pytest.raises(ValueError, match="images_sha256="):
        network_training.run(network_training.Config(out=whole.out, resume=True, **TINY))


def test_lines_of_other_names_are_not_gone_on_with(finished, tmp_path):
    whole, _ = finished
    folder = tmp_path / "copy"
    shutil.copytree(whole.out, folder)
    content = (folder / records.METRICS).read_text()
    (folder / records.METRICS).write_text(content.replace('"cdnv"', '"cdmv"', 1))
    with pytest.raises(ValueError, match="does not hold the lines") as error:
        network_training.run(network_training.Config(out=str(folder), resume=True, **TINY))
    cases.assert_one_sentence(str(error.value))


def test_sizes_beyond_the_memory_are_refused(tmp_path):
    config = network_training.Config(out=str(tmp_path / "new"), **(TINY | {"width": 10**7}))
    with pytest.raises(ValueError, match="GB a device") as error:
        network_training.run(config)
    cases.assert_one_sentence(str(error.value).replace("--runs_per_device", ""))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (records.CONFIG, 0),
        (records.CONFIG, 100),
        (records.METRICS, None),
        (records.METRICS, 0),
        (records.METRICS, 50),
        (records.METRICS, -200),
    ],
)
def test_truncated_records_are_not_resumed(finished, tmp_path, name, kept):
    whole, _ = finished
    folder = tmp_path / "copy"
    shutil.copytree(whole.out, folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if kept is not None:
        (folder / name).write_bytes(content[:kept])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = network_training.Config(out=str(folder), resume=True, **TINY)
    with pytest.raises(ValueError, match=name) as error:
        network_training.run(config)
    cases.assert_one_sentence(str(error.value))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_results_without_a_checkpoint_are_not_trained_again(finished, tmp_path):
    whole, _ = finished
    shutil.copytree(whole.out, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    config = network_training.Config(out=str(tmp_path / "copy"), resume=True, **TINY)
    with pytest.raises(ValueError, match="no checkpoint") as error:
        network_training.run(config)
    cases.assert_one_sentence(str(error.value))
    assert _lines(tmp_path / "copy") == _lines(Path(whole.out))


def test_a_run_interrupted_before_its_first_checkpoint_begins_again(
    finished, tmp_path, monkeypatch
):
    whole, _ = finished
    shutil.copy(Path(whole.out) / records.CONFIG, tmp_path)
    (tmp_path / records.METRICS).write_text('{"epoch": 0}\n{"epoch": 0, "fi')

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        network_training.run(network_training.Config(out=str(tmp_path), resume=True, **TINY))
    assert _lines(tmp_path) == _lines(Path(whole.out))[:1]


def test_a_run_that_diverges_leaves_its_neighbour_alone(finished, tmp_path):
    whole, rows = finished
    flags = TINY | {"num_seeds": 1, "learning_rate": (*whole.learning_rate, 1e9)}
    config = network_training.Config(out=str(tmp_path / "wild"), **flags)
    calm, wild = network_training.run(config)
    np.testing.assert_equal(calm, rows[0])
    assert wild["diverged_at"] is not None
    assert np.isnan(wild["loss"])
    assert wild["rank_2"] is None
    assert dufm_figure.draw(Path(config.out)).exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"depth": 1}, "--depth"),
        ({"samples_per_class": -1}, "--samples_per_class"),
        ({"measure_every": 0}, "--measure_every"),
        ({"rank_tolerance": 2.0}, "--rank_tolerance"),
        ({"features_decay": 0.0}, "--features_decay"),
        ({"features_decay": 1e300}, "--features_decay"),
        ({"weight_decay": (0.01, 0.01)}, "no weight decay may be given twice"),
        ({"learning_rate": (-1.0,)}, "learning rate"),
        ({"samples_per_class": 5, "batch_size": 51}, "batch size"),
        ({"samples_per_class": 0, "batch_size": 1}, "batch size"),
        ({"momentum": 1.0}, "momentum"),
        ({"warmup_epochs": 1000}, "warmup_epochs"),
        ({"blocks": 0}, "blocks"),
        ({"weights_scale": 0.0}, "weights_scale"),
        ({"resume": True, "overwrite": True}, "--resume"),
    ],
)
def test_flags_out_of_range(flags, named):
    with pytest.raises(ValueError, match=named) as error:
        network_training.Config(**flags)
    cases.assert_one_sentence(str(error.value))


@pytest.mark.parametrize("preset", network_training.PRESETS)
def test_presets_are_valid(preset):
    config = network_training.Config(**network_training.PRESETS[preset])
    assert config.grid.num_runs == config.num_seeds
