"""transformers' own Trainer with the mixins, against the host's own loss of the whole batch in one process: of two
processes it would contrast each one's pairs alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from helpers.hosts import trainer_runs, two_processes
from helpers.hosts.recording import Recording, against, furthest
from helpers.hosts.saved import growth
from helpers.hosts.trainer_runs import BATCH, CLIP, STEPS, Hosts, Ours, collate, evaluate, model_of, pairs, run
from transformers import CLIPModel, Trainer

from softclip_kernels import Hard, ProgressiveSelfDistillation, schedules, softclip_loss
from softclip_kernels.integrations import transformers as adapter
from softclip_kernels.integrations.hooks import UnknownHost
from softclip_kernels.integrations.transformers import SoftClipModelMixin, give_scale_a_dimension


@pytest.fixture(scope="module")
def hosts() -> dict[int, Recording]:
    """What the host's own loss does in one process: of the whole batch, and of four batches for a step."""
    return {k: Recording(**run(False, k)["recording"]) for k in (1, 4)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each of two processes did."""
    return two_processes.run("trainer_runs", tmp_path_factory.mktemp("transformers"))


def assert_exact(recording: Recording, accumulation: int) -> None:
    """The first step's gradient, of every parameter."""
    compared = against(recording.gradients, trainer_runs.exact_gradients(accumulation))
    assert all(abs(ratio - 1) < 5e-6 and error < 5e-6 for ratio, error in compared.values()), compared


@pytest.mark.parametrize("accumulation", (1, 4))
def test_one_process_trains_as_the_hosts_loss(accumulation, hosts):
    """With a column of labels, beside which the host takes a loss for one divided by the number of batches already."""
    columns = {"labels": list(range(trainer_runs.ROWS))}
    kept = {"remove_unused_columns": False}
    ours = Recording(**run(True, accumulation, columns=columns, arguments=kept)["recording"])
    assert_exact(ours, accumulation)
    assert ours.steps == hosts[accumulation].steps == STEPS
    assert furthest(ours, hosts[accumulation]) < 1e-6
    assert ours.losses == pytest.approx(hosts[accumulation].losses, abs=2e-6)


@pytest.mark.parametrize("name", ("one", "accumulated", "accelerate", "accelerate, accumulated"))
def test_two_processes_train_as_one_that_has_the_whole_batch(two, hosts, name):
    """In the Trainer, and in a loop of accelerate's."""
    accumulation = 4 if "accumulated" in name else 1
    for rank in two:
        ours = Recording(**rank[name]["recording"])
        assert_exact(ours, accumulation)
        assert furthest(ours, hosts[accumulation]) < 1e-6
        assert rank[name]["global_step"] == STEPS


def test_two_passes_are_one_pass_over_the_whole_batch(two):
    """Accumulated batches besides, of which the last alone is reduced."""
    short = {"max_steps": 5}
    one = Recording(**run(accumulation=2, arguments=short)["recording"])
    alone = Recording(**run(accumulation=2, arguments=short, micro_batches=4)["recording"])
    for ours in (alone, *(Recording(**rank["two passes"]["recording"]) for rank in two)):
        assert_exact(ours, 2)
        assert furthest(ours, one) < 1e-6


def test_progressive_self_distillation_draws_by_true_steps(two):
    """Four batches of a step share a target, which is of the global batch."""
    for rank in two:
        assert rank["psd"]["asked"] == [(step, BATCH // 4) for step in range(5) for _ in range(4)]
        assert Recording(**rank["psd"]["recording"]).parameters.keys() == dict(model_of().named_parameters()).keys()
    assert furthest(*(Recording(**rank["psd"]["recording"]) for rank in two)) == 0


def test_adamw_trains_alike():
    short = {"max_steps": 5}
    host, ours = (run(kind, adamw=True, arguments=short)["recording"]["losses"] for kind in (False, True))
    assert ours == pytest.approx(host, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "apart"),
    (
        ({"bf16": True}, 3e-2),
        ({"gradient_checkpointing": True}, 2e-6),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 2e-6),
    ),
    ids=("bf16", "checkpointing", "compiled"),
)
def test_the_trainers_options(arguments, apart, hosts):
    ours = run(arguments={"max_steps": 3} | arguments)["recording"]["losses"]
    assert ours == pytest.approx(hosts[1].losses[:3], abs=apart)


# Evaluation and files.


def test_eval_loss_is_the_hosts_and_never_missing(tmp_path):
    """Whether or not the collator asks for a loss, and with a target for training that is another."""
    host = evaluate(Hosts, model_of(), tmp_path).evaluate()["eval_loss"]
    psd = ProgressiveSelfDistillation(schedules.Linear(0.5, 0.5, 1))
    for return_loss in (True, False):
        ours = evaluate(
            Ours, model_of(CLIP), tmp_path, target=psd.at, data_collator=partial(collate, return_loss=return_loss)
        )
        assert ours.evaluate()["eval_loss"] == pytest.approx(host, abs=1e-6)


def test_a_missing_label_is_an_error_and_no_missing_loss(tmp_path):
    trainer = evaluate(Ours, model_of(CLIP), tmp_path, arguments={"label_names": ["kind"]})
    with pytest.raises(ValueError, match=r"label_names=\['kind'\], but the batch has no kind"):
        trainer.evaluate()


@pytest.mark.parametrize("names", (None, []))
def test_labels_do_not_reach_the_model(tmp_path, names):
    """Of which encoders without **kwargs know nothing."""
    model, met = model_of(CLIP), []
    model.register_forward_pre_hook(lambda _, given, named: met.append(set(named)), with_kwargs=True)
    arguments = {"remove_unused_columns": False, "label_names": names}
    trainer = evaluate(Ours, model, tmp_path, arguments, eval_dataset=pairs(40, labels=list(range(40))))
    assert trainer.evaluate()["eval_loss"] > 0
    assert met and not [each for each in met if each & {"labels", "return_loss"}]


def test_predictions_are_the_embeddings(tmp_path):
    predicted = evaluate(Ours, model_of(CLIP), tmp_path).predict(pairs(40)).predictions
    with torch.no_grad():
        host = model_of()(**collate(pairs(40)))
    assert len(predicted) == 2
    torch.testing.assert_close(torch.from_numpy(predicted[0]), host.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(predicted[1]), host.text_embeds, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reshaped", (False, True))
def test_files_are_the_hosts(tmp_path, reshaped):
    """Either model reads what the other wrote."""
    model = model_of(CLIP)
    with torch.no_grad():
        model.logit_scale.fill_(1.25)
    if reshaped:
        give_scale_a_dimension(model)
    model.save_pretrained(tmp_path / "ours")
    host = CLIPModel.from_pretrained(tmp_path / "ours")
    assert host.logit_scale.shape == () and host.logit_scale.item() == 1.25
    host.save_pretrained(tmp_path / "host")
    again = CLIP.from_pretrained(tmp_path / "host")
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.reshape(other.shape), other), name


def test_a_scale_with_a_dimension_is_the_same_parameter_and_reads_either_state():
    model = model_of(CLIP)
    scale = model.logit_scale.requires_grad_(False)
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    give_scale_a_dimension(model)
    assert model.logit_scale is scale and scale.shape == (1,) and not scale.requires_grad
    states.append({name: value.clone() for name, value in model.state_dict().items()})
    for k, state in enumerate(states):
        state["logit_scale"].fill_(k)
        model.load_state_dict(state)
        assert scale.shape == (1,) and scale.item() == k


# Groups.


@pytest.mark.parametrize("training", (True, False))
def test_pairs_of_one_id_match_each_other(tmp_path, training):
    """The column reaches the loss, although the host leaves out what the model does not name, and not the model."""
    ids = [0, 0, 1, 1, 2, 3, 4, 5]
    trainer = evaluate(Ours, model_of(CLIP), tmp_path, groups="product", eval_dataset=pairs(8, product=ids))
    (batch,) = trainer.get_eval_dataloader()
    trainer.model.train(training)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    operands = (outputs.image_embeds, outputs.text_embeds, outputs.logit_scale)
    assert loss == softclip_loss(*operands, Hard(groups=(torch.tensor(ids),) * 2)) != softclip_loss(*operands)
    with pytest.raises(ValueError, match="groups='product', but the batch has"):
        trainer.compute_loss(trainer.model, collate(pairs(8)))


# Memory.


def test_what_is_saved_grows_linearly():
    rows = pairs(384)

    def forward(model: Any) -> Any:
        def one(size: int) -> Any:
            batch = collate(rows[:size], not isinstance(model, SoftClipModelMixin))
            outputs = model(**batch)
            return softclip_loss(*outputs.values()) if isinstance(model, SoftClipModelMixin) else outputs.loss

        return one

    assert growth((96, 192, 384), forward(model_of(CLIP))) < 1.005
    assert growth((96, 192, 384), forward(model_of())) > 1.02  # the host's


# Other models, and what is refused.


def encoders() -> dict[str, Any]:
    import transformers as host

    config = trainer_runs.config
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    picture = host.CLIPVisionConfig(**text, image_size=32, patch_size=8)
    two = host.VisionTextDualEncoderConfig.from_vision_text_configs(
        picture, host.BertConfig(**text, vocab_size=64, max_position_embeddings=16), projection_dim=24
    )
    return {
        "AltCLIPModel": config(host.AltCLIPConfig, project_dim=32, max_position_embeddings=16),
        "CLIPModel": config(),
        "ChineseCLIPModel": config(host.ChineseCLIPConfig, type_vocab_size=2),
        "MetaClip2Model": config(host.MetaClip2Config),
        "VisionTextDualEncoderModel": two,
    }


@pytest.mark.parametrize("name", sorted(adapter.SUPPORTED))
def test_every_supported_encoder_gives_its_own_embeddings(name):
    import transformers as host

    kind, config = getattr(host, name), encoders()[name]
    found = []
    for made in (kind, type("Ours", (SoftClipModelMixin, kind), {})):
        torch.manual_seed(0)
        model = made(config).eval()
        model.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
        found.append(model)
    host_model, ours = found
    ours.load_state_dict(host_model.state_dict())
    batch = collate(pairs(6), return_loss=False)
    expected, outputs = host_model(**batch), ours(**batch)
    torch.testing.assert_close(outputs.image_embeds, expected.image_embeds)
    torch.testing.assert_close(outputs.text_embeds, expected.text_embeds)
    logits = outputs.logit_scale * outputs.image_embeds @ outputs.text_embeds.T
    torch.testing.assert_close(logits, expected.logits_per_image)


@pytest.mark.parametrize("name", ("SiglipModel", "Aimv2Model", "ClapModel", "CLIPVisionModel"))
def test_an_encoder_of_another_loss_is_refused_by_name(name):
    import transformers as host

    with pytest.raises(TypeError, match=f"Other is made of {name}; allowed: CLIPModel, .* softmax"):
        type("Other", (SoftClipModelMixin, getattr(host, name)), {})(None)


def test_return_loss_outside_of_the_trainer_is_refused():
    with pytest.raises(ValueError, match="return_loss=True: this model returns embeddings"):
        model_of(CLIP)(**collate(pairs(4)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"target": "psd"}, TypeError, "target is a str; allowed: None, a Target, or make"),
        ({"target": Hard(), "groups": "ids"}, ValueError, "give target or groups='ids', not both"),
        ({"micro_batches": 0}, ValueError, "micro_batches=0; at least 1"),
        ({"micro_batches": 2.5}, TypeError, "micro_batches"),
        ({"backend": "cuda"}, ValueError, "cuda"),
        ({"compute_loss_func": lambda *_: 0}, ValueError, "compute_loss_func would not be called"),
    ),
)
def test_bad_values(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(Ours, model_of(CLIP), tmp_path, **options)


def test_the_hosts_own_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"the model is a CLIPModel; allowed: one with SoftClipModelMixin"):
        evaluate(Ours, model_of(), tmp_path)


def test_another_host_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, batch: None)
    with pytest.raises(UnknownHost, match=r"Trainer\.compute_loss takes \(model, batch\)"):
        evaluate(Ours, model_of(CLIP), tmp_path)
