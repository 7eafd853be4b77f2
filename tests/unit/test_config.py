from pathlib import Path

import pytest

from tinyflux.model.model import TinyFluxConfig
from tinyflux.trainer import config as configs
from tinyflux.trainer.config import TrainerConfig, fit_model

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"


def load_config(argv: list[str]):
    return configs.load_config(argv, CONFIGS)


def write(tmp_path, text: str) -> list[str]:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_file_then_command_line(tmp_path):
    argv = write(
        tmp_path,
        'run_dir = "here"\n[model]\nuse_t5_vec = false\naxes_dims_rope = [16, 56, 56]\n[data]\nsources = ["a", "b"]\n'
        'weights = [1, 2.5]\n[trainer]\ntotal_steps = 7\nuse_huber_loss = true\nsample_prompts = ["a cat, asleep"]\n',
    )
    config, given = load_config([*argv, "--trainer.total-steps", "9", "--trainer.no-use-huber-loss"])
    assert config.run_dir == "here" and not config.model.use_t5_vec and config.data.weights == [1.0, 2.5]
    assert config.trainer.total_steps == 9 and not config.trainer.use_huber_loss
    assert config.trainer.sample_prompts == ["a cat, asleep"]
    assert {"model.use_t5_vec", "trainer.total_steps", "data.sources"} - given == {"model.use_t5_vec"}


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.toml")))
def test_presets_are_valid(name):
    config, given = load_config(["--config", name, "--run-dir", "there"])
    assert config.run_dir == "there" and "data.global_batch_size" in given
    assert config.data.global_batch_size % config.data.micro_batch_size == 0


def test_unknown_preset():
    with pytest.raises(FileNotFoundError, match="did you mean demo. Accepted here: deep-1gpu, deep-8gpu, deep-m"):
        load_config(["--config", "dmo"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[trainer]\nlearning_rat = 1e-3\n",
            "unknown key trainer.learning_rat: did you mean learning_rate",
        ),
        ("[optimizer]\nlr = 1\n", "unknown key optimizer: Accepted here: data, dry_run, model"),
        ("trainer = 3\n", r"must be a table, \[trainer\]"),
        ("[trainer]\nlearning_rate = '1e-4'\n", "trainer.learning_rate is '1e-4': it must be a number"),
        ("[trainer]\ntotal_steps = 'many'\n", "trainer.total_steps is 'many': it must be an integer"),
        ("[trainer]\ndtype = 'float8'\n", "trainer.dtype is 'float8': it must be one of bfloat16, float32"),
        ("[trainer]\ntext_dropout = 2\n", r"trainer.text_dropout is 2: it must be in \[0, 1\]"),
        ("[trainer]\ninit_from = ''\n", "trainer.init_from is '': it must be a file, a folder or user/repo"),
        ("[parallel]\ntimeout = 0\n", "parallel.timeout is 0: it must be at least 1"),
        ("[trainer\n", "run.toml"),
    ],
)
def test_bad_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainer]\nmin_lr = 1.0\n", "trainer.min_lr is 1.0: it must be at most trainer.learning_rate"),
        ("[model]\nhidden_size = 500\n", "hidden_size"),
    ],
)
def test_bad_value(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        load_config(write(tmp_path, text))
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_defaults_of_the_original():
    c = TrainerConfig()
    assert (c.learning_rate, c.weight_decay, c.betas, c.grad_clip) == (1e-4, 0.01, (0.9, 0.95), 1.0)
    assert (c.warmup_steps, c.total_steps, c.ema_decay) == (1000, 100_000, 0.9999)
    assert (c.shift, c.use_snr_weighting, c.snr_gamma, c.huber_delta) == (3.0, True, 5.0, 0.1)
    assert (c.lune_weight, c.lune_warmup_steps, c.lune_dropout) == (0.1, 1000, 0.1)
    assert (c.sol_weight, c.sol_warmup_steps, c.sol_dropout) == (0.05, 2000, 0.1)
    assert (c.save_every_steps, c.keep_last_n_steps, c.save_every_epochs, c.keep_last_n_epochs) == (5000, 3, 1, 3)
    assert (c.log_every, c.sample_every) == (100, 2000)


def test_sizes_come_from_the_shards():
    fields = {"latents": (16, 8, 8), "t5_embeds": (32, 128), "clip_pooled": (96,), "lune": (10, 64)}
    config = fit_model(TinyFluxConfig(), {"model.in_channels"}, fields)
    assert (config.joint_attention_dim, config.pooled_projection_dim, config.lune_expert_dim) == (128, 96, 64)
    with pytest.raises(ValueError, match="model.joint_attention_dim is 768, but the shards' t5_embeds"):
        fit_model(TinyFluxConfig(), {"model.joint_attention_dim"}, fields)
