"""The callbacks, with the real libraries: every step clipped once, as attaching by hand does it."""

import copy
import importlib
import math
import os
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clipcore as cc
from clipcore_torch.callbacks import lightning_callback, trainer_callback

os.environ.setdefault("USE_TF", "0")  # transformers would ask for tf_keras where TensorFlow is installed as well
# the libraries' own, of their own dependencies
pytestmark = [pytest.mark.filterwarnings("ignore")]
NAMES = ["lightning.pytorch", "pytorch_lightning"]


def samples(count=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator) * 10, torch.randn(count, 2, generator=generator)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def by_hand(policy, batch_size, parts=1, epochs=1):
    """The weights and reports of plain training with an attached policy."""
    network = layers()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    attachment = cc.attach(optimizer, policy, network)
    for _ in range(epochs):
        batches = list(DataLoader(TensorDataset(*samples()), batch_size))
        for start in range(0, len(batches), parts):
            optimizer.zero_grad()
            for x, y in batches[start : start + parts]:
                (nn.functional.mse_loss(network(x), y) / parts).backward()
            optimizer.step()
    return network.state_dict(), list(attachment.reports), attachment.state_dict()


def assert_like_by_hand(network, reports, wanted):
    weights, exact, _ = wanted
    assert [r.norm for r in reports] == pytest.approx([r.norm for r in exact], rel=1e-5)
    assert any(r.clipped for r in exact)
    torch.testing.assert_close(dict(network.state_dict()), dict(weights))


POLICIES = [cc.ClipByGlobalNorm(0.1), cc.PerGroup({"weight$": cc.AutoClip(30.0)}, default=cc.AdaptiveClip(0.01))]


@pytest.fixture(params=NAMES)
def pl(request):
    return importlib.import_module(request.param)


def lightning_module(pl, manual=False):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = layers()
            self.automatic_optimization = not manual

        def training_step(self, batch, index):
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x), y)
            if manual:
                optimizers = self.optimizers()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in optimizers:
                    optimizer.step()
                return None
            return loss

        def configure_optimizers(self):
            if manual:
                return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)]
            return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    return Module()


def lightning_trainer(pl, folder, callback, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        **{"enable_checkpointing": False, "max_epochs": 1, **options},
    )


def loader(batch_size):
    return DataLoader(TensorDataset(*samples()), batch_size)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_lightning_clips_each_step_once_after_accumulation(pl, policy, parts, tmp_path):
    seen = []
    module = lightning_module(pl)
    callback = lightning_callback(policy, on_report=seen.append)
    lightning_trainer(pl, tmp_path, callback, accumulate_grad_batches=parts).fit(module, loader(3))
    assert_like_by_hand(module.net, seen, by_hand(policy, 3, parts))
    assert callback.attachments == []


def test_lightning_clips_each_of_several_optimizers(pl, tmp_path):
    seen = []
    module = lightning_module(pl, manual=True)
    lightning_trainer(pl, tmp_path, lightning_callback(cc.ClipByGlobalNorm(0.1), on_report=seen.append)).fit(
        module, loader(3)
    )
    assert len(seen) == 2 * 4
    for part in (module.net[0], module.net[2]):
        assert math.sqrt(sum(float(p.grad.square().sum()) for p in part.parameters())) == pytest.approx(0.1, rel=1e-5)


def test_lightning_saves_what_the_policy_learned_in_its_checkpoints(pl, tmp_path):
    policy = cc.AutoClip(30.0)
    first = lightning_callback(policy)
    trainer = lightning_trainer(pl, tmp_path, first)
    trainer.fit(lightning_module(pl), loader(3))
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    seen, module = [], lightning_module(pl)
    again = lightning_callback(policy, on_report=seen.append)
    lightning_trainer(pl, tmp_path, again, max_epochs=2).fit(module, loader(3), ckpt_path=path, weights_only=False)
    weights, reports, state = by_hand(policy, 3, epochs=2)
    assert_like_by_hand(module.net, seen, (weights, reports[4:], state))
    assert int(again.state_dict()["0"]["AutoClip.count"]) == 8


def test_lightning_with_a_clip_of_its_own_is_refused(pl, tmp_path):
    callback = lightning_callback(cc.ClipByGlobalNorm(0.1))
    with pytest.raises(cc.InvalidInput, match=r"the Trainer clips as well \(gradient_clip_val=1\.0\)"):
        lightning_trainer(pl, tmp_path, callback, gradient_clip_val=1.0).fit(lightning_module(pl), loader(3))


def test_the_lightning_callback_is_of_the_library_and_can_be_sent_to_another_process(pl):
    callback = lightning_callback(cc.AutoClip(30.0))
    assert isinstance(callback, pl.Callback)
    assert pickle.loads(pickle.dumps(callback)).policy == callback.policy


class Regression(nn.Module):
    """What the Trainer takes for a model: a loss from named inputs."""

    def __init__(self):
        super().__init__()
        self.net = layers()

    def forward(self, x, labels):
        output = self.net(x)
        return {"loss": nn.functional.mse_loss(output, labels), "logits": output}


@pytest.fixture
def transformers():
    return importlib.import_module("transformers")


def trainer_of(transformers, folder, callback, **options):
    model = Regression()
    x, y = samples()
    dataset = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "num_train_epochs": 1,
        "per_device_train_batch_size": 3,
        "max_grad_norm": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(dataset)

    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return InOrder(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=dataset,
        optimizers=(optimizer, schedule),
        callbacks=[callback],
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_hugging_face_trainer_clips_each_step_once_after_accumulation(transformers, policy, parts, tmp_path):
    seen = []
    trainer = trainer_of(
        transformers, tmp_path, trainer_callback(policy, on_report=seen.append), gradient_accumulation_steps=parts
    )
    trainer.train()
    assert_like_by_hand(trainer.model.net, seen, by_hand(policy, 3, parts))


def test_the_hugging_face_trainer_may_train_again(transformers, tmp_path):
    seen = []
    callback = trainer_callback(cc.ClipByGlobalNorm(0.1), on_report=seen.append)
    trainer = trainer_of(transformers, tmp_path, callback)
    for count in (4, 8):
        trainer.train()
        assert len(seen) == count
        assert callback.attachments == []


def test_the_hugging_face_trainer_with_a_clip_of_its_own_is_refused(transformers, tmp_path):
    trainer = trainer_of(transformers, tmp_path, trainer_callback(cc.ClipByGlobalNorm(0.1)), max_grad_norm=1.0)
    with pytest.raises(cc.InvalidInput, match=r"max_grad_norm=1\.0, which is 1\.0 by default"):
        trainer.train()


def test_under_accelerate_with_a_scaler_the_unscaled_gradients_are_clipped(transformers, tmp_path):
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer

    network = layers()
    twin = copy.deepcopy(network)
    optimizer, manual = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (network, twin))
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**8)
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    seen = []
    callback = trainer_callback(cc.ClipByGlobalNorm(0.1), on_report=seen.append)
    arguments = type("Arguments", (), {"max_grad_norm": 0})()
    callback.on_train_begin(arguments, None, None, optimizer=wrapped, model=network)
    x, y = samples()
    scaler.scale(nn.functional.mse_loss(network(x), y)).backward()
    wrapped.step()
    nn.functional.mse_loss(twin(x), y).backward()
    report = cc.clip_grads_(twin, cc.ClipByGlobalNorm(0.1))
    manual.step()
    assert seen == [report]
    torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_a_library_that_is_missing_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] in ("transformers", "lightning", "pytorch_lightning"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    monkeypatch.setattr("clipcore_torch.callbacks._LIGHTNING", ("no_lightning_here",))
    with pytest.raises(ImportError, match="pip install lightning"):
        lightning_callback(cc.ClipByGlobalNorm(0.1))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install 'transformers"):
        trainer_callback(cc.ClipByGlobalNorm(0.1))


def test_the_module_imports_neither_library():
    import subprocess
    import sys

    code = "import sys, clipcore_torch.callbacks; print(sorted({'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert importlib.import_module("clipcore_torch.callbacks").lightning_callback is lightning_callback
