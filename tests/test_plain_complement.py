"""COT outside fastai equals Algorithm 1 written out: plain loops, accelerate, Lightning, a Hugging Face Trainer."""

import copy
import io
import json
import os
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from complement_objectives.losses import ComplementEntropyLoss
from complement_objectives.two_updates import (
    ComplementUpdate,
    complement_step,
    complement_trainer,
    second_optimizer,
)

N, K = 88, 5
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
OPTS = dict(
    sgd=SGD,
    adamw=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    adagrad=partial(torch.optim.Adagrad, lr=1e-2),
    rmsprop=partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
)


def cross_entropy(z, y):
    return -(z.gather(1, y[:, None])[:, 0] - z.exp().sum(1).log()).mean()


def complement(z, y):
    "COT Eq 3 as printed, negated."
    p = z.softmax(1)
    q = p / (1 - p.gather(1, y[:, None]))
    wrong = torch.arange(z.shape[1]) != y[:, None]
    return (q * q.log()).where(wrong, 0).sum(1).mean() / (z.shape[1] - 1)


def network(kind='all'):
    "With layers that see the batch and draw random numbers; 'still': without the random ones; 'plain': with neither."
    torch.manual_seed(0)
    between = dict(
        all=[nn.BatchNorm1d(16), nn.Dropout(0.2)], still=[nn.BatchNorm1d(16)], plain=[]
    )[kind]
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), *between, nn.Linear(16, K)
    ).double()


def batches(size=8, n=N):
    "Micro-batches; the last may be small."
    g = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(n, 6, dtype=torch.double, generator=g),
        torch.randint(K, (n,), generator=g),
    )
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


def updates(micro, n):
    return [micro[i : i + n] for i in range(0, len(micro), n)]


def written_out(
    model,
    groups,
    opt_func=SGD,
    second=None,
    n=None,
    clip=None,
    schedule=None,
    context=nullcontext,
    scaler=None,
    losses=(cross_entropy, complement),
):
    "Algorithm 1, with accumulation: both updates see every micro-batch of a group, losses divided by n or their number."
    opt = opt_func(model.parameters())
    second = opt if second == 'shared' else (second or opt_func)(model.parameters())
    torch.manual_seed(2)
    seen = []
    for i, group in enumerate(groups):
        for o, loss_func in zip((opt, second), losses):
            if schedule:
                for g in o.param_groups:
                    g['lr'] = schedule(i)
            o.zero_grad()
            for x, y in group:
                with context():
                    loss = loss_func(model(x), y) / (n or len(group))
                (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(o)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler:
                scaler.step(o)
                scaler.update()
            else:
                o.step()
        seen.append(loss.item())
    return model, seen


def apart(a, b):
    return max(
        (p.double() - q.double()).abs().max().item()
        for p, q in zip(a.state_dict().values(), b.state_dict().values())
    )


def same(model, oracle, start=None, eps=1e-12):
    if start is not None:
        assert apart(oracle, start) > 1e-2  # it has gone somewhere
    assert apart(model, oracle) < eps


LIBRARY = (
    nn.functional.cross_entropy,
    ComplementEntropyLoss(),
)  # in half precision, where the last bits depend on the formula


# Plain loops


@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('second', [None, 'shared', 'own'])
@pytest.mark.parametrize('n, clip', [(1, None), (2, 0.05), (3, None)])
def test_plain_loop(opt, second, n, clip):
    own = partial(torch.optim.SGD, lr=0.03)
    oracle, losses = written_out(
        network(),
        updates(batches(), n),
        OPTS[opt],
        own if second == 'own' else second,
        clip=clip,
    )
    model = network()
    first = OPTS[opt](model.parameters())
    update = ComplementUpdate(
        model,
        first,
        dict(shared=first, own=own(model.parameters())).get(second),
        clip=clip,
    )
    torch.manual_seed(2)
    seen, micro = [], batches()
    for i, (x, y) in enumerate(micro):
        last = len(micro) - len(micro) % n
        size = n if i < last else len(micro) % n
        (nn.functional.cross_entropy(model(x), y) / size).backward()
        update.keep(x, y)
        if (i + 1) % n == 0 or i == len(micro) - 1:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            first.step()
            first.zero_grad()
            seen.append(update.step())
            assert all(p.grad is None for p in model.parameters()) and not update.kept
    same(model, oracle, network())
    if n == 1:
        assert torch.stack(seen).tolist() == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize('order', ['zero first', 'zero last', 'zeros'])
def test_gradients_are_left_as_they_were(order):
    oracle, _ = written_out(network(), updates(batches(), 1))
    model = network()
    opt = SGD(model.parameters())
    update = ComplementUpdate(model, opt)
    torch.manual_seed(2)
    for x, y in batches():
        if order == 'zero first':
            opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        if order == 'zeros':
            opt.zero_grad(set_to_none=False)
        before = [p.grad.clone() for p in model.parameters()]
        update.keep(x, y)
        update.step()
        assert all((p.grad == g).all() for p, g in zip(model.parameters(), before))
        if order == 'zero last':
            opt.zero_grad()
    same(model, oracle, network())


def test_fixed_divisor_and_weights():
    micro = batches()
    for how in ('backward', 'weight'):
        oracle, _ = written_out(network(), updates(micro, 3), n=3)
        model = network()
        opt = SGD(model.parameters())
        update = ComplementUpdate(
            model,
            opt,
            backward=(lambda loss: (loss / 3).backward())
            if how == 'backward'
            else None,
        )
        torch.manual_seed(2)
        for group in updates(micro, 3):
            for x, y in group:
                (nn.functional.cross_entropy(model(x), y) / 3).backward()
                update.keep(x, y, weight=1 / 3 if how == 'weight' else None)
            opt.step()
            opt.zero_grad()
            update.step()
        same(model, oracle, network())


def test_mean_over_unequal_micro_batches():
    "Weights by size give the big batch."
    x, y = (torch.cat(t) for t in zip(*batches()))
    oracle, _ = written_out(network('plain'), [[(x, y)]] * 3)
    model = network('plain')
    opt = SGD(model.parameters())
    update = ComplementUpdate(model, opt)
    for _ in range(3):
        for a, b in zip(x.split([30, 1, 57]), y.split([30, 1, 57])):
            (nn.functional.cross_entropy(model(a), b) * len(a) / N).backward()
            update.keep(a, b, weight=len(a) / N)
        opt.step()
        opt.zero_grad()
        update.step()
    same(model, oracle, network('plain'))


@pytest.mark.parametrize('opt', OPTS)
def test_schedule_and_checkpoint(opt):
    micro = batches()
    schedule = lambda i: 1e-2 * 0.8**i
    oracle, _ = written_out(network(), updates(micro, 1), OPTS[opt], schedule=schedule)
    model, saved = network(), None
    torch.manual_seed(2)
    for part in (micro[:5], micro[5:]):
        first = OPTS[opt](model.parameters())
        if saved:
            first.load_state_dict(copy.deepcopy(saved))
        update = ComplementUpdate(model, first)
        done = 0 if saved is None else 5
        for i, (x, y) in enumerate(part):
            for g in first.param_groups:
                g['lr'] = schedule(i + done)
            nn.functional.cross_entropy(model(x), y).backward()
            first.step()
            first.zero_grad()
            update.keep(x, y)
            update.step()
        saved = through_a_file(first.state_dict())
    same(model, oracle, network())


def through_a_file(state):
    "As a checkpoint goes."
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    'name',
    [
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type)
        and issubclass(cls, torch.optim.Optimizer)
        and name not in ('Optimizer', 'LBFGS', 'SparseAdam', 'Muon')
    ],
)
@pytest.mark.parametrize('named', [False, True])
def test_every_optimizer_of_torch(name, named):
    "Built like the first, saved within it, and the first one without COT reads the file as well."
    make = lambda parameters: getattr(torch.optim, name)(parameters, lr=1e-3)
    oracle, _ = written_out(network(), updates(batches(), 1), make)
    model, opt = network(), None
    torch.manual_seed(2)
    for i, (x, y) in enumerate(batches()):
        if i % 5 == 0:
            saved, opt = (
                opt and through_a_file(opt.state_dict()),
                make(model.named_parameters() if named else model.parameters()),
            )
            if saved:
                opt.load_state_dict(saved)
            update = ComplementUpdate(model, opt)
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        update.keep(x, y)
        update.step()
    same(model, oracle, eps=1e-8)  # NAdam loads a single-precision number as a double
    assert apart(oracle, network()) > 1e-4
    plain = make(model.named_parameters() if named else model.parameters())
    plain.load_state_dict(through_a_file(opt.state_dict()))
    nn.functional.cross_entropy(model(x), y).backward()
    plain.step()


def test_load_into_a_running_update():
    model = network()
    opt = SGD(model.parameters())
    update = ComplementUpdate(model, opt)

    def go(part):
        torch.manual_seed(2)
        for x, y in part:
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            update.keep(x, y)
            update.step()
        return copy.deepcopy(model)

    go(batches()[:4])
    weights, state = copy.deepcopy(model.state_dict()), through_a_file(opt.state_dict())
    first = go(batches()[4:])
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    same(go(batches()[4:]), first, eps=1e-15)


def test_group_that_joins_later():
    def run(step):
        model = network()
        opt = SGD(model[-1].parameters())
        update = step(model, opt)
        torch.manual_seed(2)
        for i, (x, y) in enumerate(batches()):
            if i == 4:
                opt.add_param_group(dict(params=list(model[0].parameters()), lr=0.05))
            update(i, x, y)
        return model

    def written(model, opt):
        second = SGD(model[-1].parameters())

        def update(i, x, y):
            if i == 4:
                second.add_param_group(
                    dict(params=list(model[0].parameters()), lr=0.05)
                )
            for o, loss in ((opt, cross_entropy), (second, complement)):
                model.zero_grad()
                loss(model(x), y).backward()
                o.step()

        return update

    def ours(model, opt):
        second = ComplementUpdate(model, opt)

        def update(i, x, y):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            second.keep(x, y)
            second.step()

        return update

    same(run(ours), run(written), network())


# Half precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('clip', [None, 0.05])
def test_autocast(dtype, inside, clip):
    "`inside`: the whole update in one autocast block, whose cached weights must not be used again."
    context = lambda: torch.autocast('cpu', dtype=dtype)
    scaler = (
        (lambda: torch.amp.GradScaler('cpu'))
        if dtype == torch.float16
        else (lambda: None)
    )
    micro = [(x.float(), y) for x, y in batches()]
    oracle, _ = written_out(
        network().float(),
        updates(micro, 2),
        context=context,
        scaler=scaler(),
        clip=clip,
        losses=LIBRARY,
    )
    model, scaler = network().float(), scaler()
    opt = SGD(model.parameters())
    update = ComplementUpdate(
        model, opt, scaler=scaler, clip=clip, context=nullcontext if inside else context
    )
    torch.manual_seed(2)
    for group in updates(micro, 2):
        with context() if inside else nullcontext():
            for x, y in group:
                with nullcontext() if inside else context():
                    loss = nn.functional.cross_entropy(model(x), y) / len(group)
                (scaler.scale(loss) if scaler else loss).backward()
                update.keep(x, y)
            if scaler:
                scaler.unscale_(opt)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler:
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
            opt.zero_grad()
            update.step()
    assert apart(oracle, network()) > 1e-2
    same(model, oracle, eps=1e-12)


@pytest.mark.parametrize('one_call', [False, True])
@pytest.mark.parametrize('clip', [None, 0.05])
def test_scaler(one_call, clip):
    "A power of two changes nothing in double precision, nor does an overflow, but for the update that it stops."
    oracle, _ = written_out(network('plain'), updates(batches(), 1), clip=clip)
    model, scaler = network('plain'), torch.amp.GradScaler('cpu', growth_interval=3)
    opt, second = SGD(model.parameters()), SGD(model.parameters())
    update = ComplementUpdate(model, opt, second, scaler=scaler, clip=clip)
    for x, y in batches():
        if one_call:
            complement_step(
                model,
                nn.CrossEntropyLoss(),
                opt,
                second,
                x,
                y,
                scaler=scaler,
                clip=clip,
            )
        else:
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.unscale_(opt)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            update.keep(x, y)
            update.step()
    assert scaler.get_scale() == 2**16 * 2 ** (2 * len(batches()) // 3)
    same(model, oracle, network('plain'))


def test_overflow_stops_one_update():
    model, micro = network('plain'), batches()
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**16)
    opt = SGD(model.parameters())
    update = ComplementUpdate(model, opt, scaler=scaler)
    x, y = micro[0]
    for bad in (False, True):
        before = copy.deepcopy(model)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        primary = copy.deepcopy(model)
        update.keep(x * float('inf') if bad else x, y)
        update.step()
        assert apart(primary, before) > 0 and (apart(model, primary) == 0) == bad
    assert scaler.get_scale() == 2**15


# One call


@pytest.mark.parametrize('second', ['own', 'shared'])
def test_complement_step(second):
    oracle, losses = written_out(
        network(), updates(batches(), 1), second=None if second == 'own' else second
    )
    model = network()
    opt = SGD(model.parameters())
    other = opt if second == 'shared' else SGD(model.parameters())
    torch.manual_seed(2)
    seen = [
        complement_step(model, nn.CrossEntropyLoss(), opt, other, x, y)
        for x, y in batches()
    ]
    same(model, oracle, network())
    assert [b.item() for _, b in seen] == pytest.approx(losses, abs=1e-12)


def test_complement_step_refuses_what_it_would_drop():
    model = network()
    opt = SGD(model.parameters())
    x, y = batches()[0]
    model(x).sum().backward()
    with pytest.raises(ValueError, match='gradients already'):
        complement_step(model, nn.CrossEntropyLoss(), opt, opt, x, y)
    opt.zero_grad(set_to_none=False)
    complement_step(model, nn.CrossEntropyLoss(), opt, opt, x, y)


def test_complement_step_with_fastai_and_functions():
    optimizer = pytest.importorskip('fastai.optimizer')
    oracle, _ = written_out(
        network(), updates(batches(), 1), partial(torch.optim.SGD, lr=0.1)
    )
    for make in (
        lambda m: optimizer.SGD(list(m.parameters()), lr=0.1),
        lambda m: optimizer.OptimWrapper(
            params=list(m.parameters()), lr=0.1, opt=torch.optim.SGD
        ),
    ):
        model = network()
        torch.manual_seed(2)
        opt, second = make(model), make(model)
        for x, y in batches():
            complement_step(
                lambda x: model(x), nn.CrossEntropyLoss(), opt, second, x, y
            )
        same(model, oracle, network())


class Named(nn.Module):
    "A network with the manners of Hugging Face's."

    def __init__(self, net, output='object'):
        super().__init__()
        self.net, self.output = net, output

    def forward(self, pixels, labels=None):
        logits = self.net(pixels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if self.output == 'tuple':
            return (logits,) if loss is None else (loss, logits)
        out = dict(logits=logits) if loss is None else dict(loss=loss, logits=logits)
        return type('Output', (), out)() if self.output == 'object' else out


@pytest.mark.parametrize('output', ['object', 'dict', 'tuple'])
@pytest.mark.parametrize('one_call', [False, True])
def test_dict_batches(output, one_call):
    oracle, _ = written_out(network(), updates(batches(), 1))
    model = Named(network(), output)
    opt, second = SGD(model.parameters()), SGD(model.parameters())
    update = ComplementUpdate(model, opt, second)
    torch.manual_seed(2)
    for x, y in batches():
        batch = dict(pixels=x, labels=y)
        if one_call:
            complement_step(model, nn.CrossEntropyLoss(), opt, second, batch)
        else:
            update.keep(batch)
            nn.functional.cross_entropy(
                oracle_logits(model, batch), batch.pop('labels')
            ).backward()  # pop: as the Trainer does
            opt.step()
            opt.zero_grad()
            update.step()
    same(model.net, oracle, network())


def oracle_logits(model, batch):
    return model.net(batch['pixels'])


def test_forward():
    "Which logit belongs to which label: a language model's labels are those of the next position."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 9), nn.Linear(9, 7)).double()
    tokens = torch.randint(7, (4, 6))
    pairs = lambda: (model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    oracle, start = copy.deepcopy(model), copy.deepcopy(model)
    written_out(
        oracle_flat := nn.Sequential(*oracle),
        [[(tokens[:, :-1].flatten(), tokens[:, 1:].flatten())]] * 5,
    )
    opt = SGD(model.parameters())
    with pytest.raises(ValueError, match='labels of shape'):
        complement_step(model, nn.CrossEntropyLoss(), opt, opt, dict(labels=tokens))
    opt = SGD(model.parameters())
    update = ComplementUpdate(model, opt, forward=lambda model, batch: pairs())
    for _ in range(5):
        nn.functional.cross_entropy(*pairs()).backward()
        opt.step()
        opt.zero_grad()
        update.keep(dict(input_ids=tokens))
        update.step()
    same(model, oracle_flat, start)


# What goes wrong


@pytest.mark.parametrize('loss_func', ['primary', 3])
def test_what_is_no_loss_is_refused_before_the_first_update(loss_func):
    model, start = network(), network()
    opt = SGD(model.parameters())
    (x, y), *_ = batches()
    with pytest.raises(ValueError, match='loss_func is'):
        ComplementUpdate(model, opt, loss_func=loss_func)
    with pytest.raises(ValueError, match='loss_func is'):
        complement_step(model, cross_entropy, opt, opt, x, y, loss_func)
    with pytest.raises(ValueError, match='clip is the text'):
        ComplementUpdate(model, opt, clip='1')
    assert apart(model, start) == 0


def test_refusals():
    model = network()
    opt = SGD(model.parameters())
    x, y = batches()[0]
    update = ComplementUpdate(model, opt)
    with pytest.raises(ValueError, match='no batch was kept'):
        update.step()
    update.keep(x, y)
    with pytest.raises(ValueError, match='has not stepped'):
        update.step()
    nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    update.step()
    update.keep(x, y)
    with pytest.raises(ValueError, match='has not stepped'):
        update.step()
    update.clear()
    with pytest.raises(ValueError, match='no batch was kept'):
        update.step()
    with pytest.raises(ValueError, match='clip must be above 0'):
        ComplementUpdate(model, opt, clip=0.0)
    with pytest.raises(ValueError, match='no torch optimizer'):
        ComplementUpdate(model, object())


def test_no_hook_is_left_behind():
    model = network()
    opt = SGD(model.parameters())
    ComplementUpdate(model, opt)
    assert not opt._optimizer_step_post_hooks


# Accelerate


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip('accelerate')
    from accelerate.state import AcceleratorState, GradientState

    def make(fp16=False, **kwargs):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, **kwargs)
        if fp16:  # accelerate offers it on GPUs only
            accelerator.native_amp, accelerator.scaler = (
                True,
                torch.amp.GradScaler('cpu', init_scale=fp16),
            )
            accelerator.state._mixed_precision = 'fp16'
        return accelerator

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerated(
    accelerator,
    model,
    micro,
    clip=None,
    second=None,
    one_call=False,
    explicit=False,
    epochs=1,
    opt_func=SGD,
):
    "The loop of accelerate's documentation, with the second update."
    opt = opt_func(model.parameters())
    data = torch.utils.data.TensorDataset(*(torch.cat(t) for t in zip(*micro)))
    loader = torch.utils.data.DataLoader(data, batch_size=len(micro[0][1]))
    net, opt, loader = accelerator.prepare(model, opt, loader)
    if second == 'prepared':
        second = accelerator.prepare(opt_func(model.parameters()))
    elif second == 'shared':
        second = opt
    elif second == 'bare':
        second = opt_func(model.parameters())
    if one_call and second is None:
        second = second_optimizer(opt)
    update = (
        None
        if one_call
        else ComplementUpdate(
            net,
            opt,
            second,
            clip=clip,
            backward=accelerator.backward if explicit else None,
        )
    )
    torch.manual_seed(2)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(net):
                if one_call:
                    losses = complement_step(
                        net,
                        nn.CrossEntropyLoss(),
                        opt,
                        second,
                        x,
                        y,
                        clip=clip,
                        backward=accelerator.backward if explicit else None,
                    )
                    assert losses[1].isnan().item() != accelerator.sync_gradients
                    continue
                accelerator.backward(nn.functional.cross_entropy(net(x), y))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), clip)
                opt.step()
                opt.zero_grad()
                update.keep(x, y)
                assert (update.step() is None) != accelerator.sync_gradients
    return model


@pytest.mark.parametrize('n, clip', [(1, None), (2, 0.05), (2, None), (3, 0.05)])
@pytest.mark.parametrize('second', [None, 'shared', 'bare', 'prepared'])
@pytest.mark.parametrize(
    'how', ['update', 'update explicit', 'one call', 'one call explicit']
)
def test_accelerate(accelerate, n, clip, second, how):
    accelerator = accelerate(gradient_accumulation_steps=n)
    groups = updates(batches(), n) * 2
    oracle, _ = written_out(
        network('still'),
        groups,
        second='shared' if second == 'shared' else None,
        n=n,
        clip=clip,
    )
    model = accelerated(
        accelerator,
        network('still'),
        batches(),
        clip,
        second,
        'one call' in how,
        'explicit' in how,
        epochs=2,
    )
    same(model, oracle, network('still'))


@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('one_call', [False, True])
def test_accelerate_bf16(accelerate, n, one_call):
    micro = [(x.float(), y) for x, y in batches()]
    oracle, _ = written_out(
        network('still').float(),
        updates(micro, n),
        n=n,
        context=lambda: torch.autocast('cpu', torch.bfloat16),
        losses=[lambda z, y, loss=loss: loss(z.float(), y) for loss in LIBRARY],
    )  # accelerate gives float32 logits
    model = accelerated(
        accelerate(gradient_accumulation_steps=n, mixed_precision='bf16'),
        network('still').float(),
        micro,
        one_call=one_call,
    )
    same(model, oracle, network('still').float())


@pytest.mark.parametrize('n, clip', [(1, 0.05), (3, None), (3, 0.05)])
@pytest.mark.parametrize('second', [None, 'shared', 'bare', 'prepared'])
@pytest.mark.parametrize(
    'how', ['update', 'update explicit', 'one call', 'one call explicit']
)
def test_accelerate_fp16(accelerate, n, clip, second, how):
    "Double precision is not cast, so the loop without a scaler is the oracle."
    oracle, _ = written_out(
        network('still'),
        updates(batches(), n),
        second='shared' if second == 'shared' else None,
        n=n,
        clip=clip,
    )
    accelerator = accelerate(fp16=2.0**16, gradient_accumulation_steps=n)
    if (
        second == 'prepared' and clip and 'update' in how
    ):  # accelerate itself unscales twice
        with pytest.warns(UserWarning, match='once for every prepared optimizer'):
            accelerated(accelerator, network('still'), batches(), clip, second)
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        model = accelerated(
            accelerator,
            network('still'),
            batches(),
            clip,
            second,
            'one call' in how,
            'explicit' in how,
        )
    same(model, oracle, network('still'))


def test_accelerate_clips_by_a_number(accelerate):
    accelerator = accelerate(fp16=2.0**16)
    model, opt = accelerator.prepare(
        network('still'), SGD(network('still').parameters())
    )
    with pytest.raises(ValueError, match='give clip as a number'):
        ComplementUpdate(
            model,
            opt,
            clip=lambda parameters: accelerator.clip_grad_norm_(parameters, 1.0),
        )


def test_bare_optimizer_under_accelerate(accelerate):
    "Given the optimizer of before `prepare`, the update cannot know of accumulation, and says so."
    accelerator = accelerate(gradient_accumulation_steps=2)
    model = network('still')
    bare = SGD(model.parameters())
    net, opt = accelerator.prepare(model, bare)
    update = ComplementUpdate(net, bare)
    with pytest.raises(ValueError, match='has not stepped'):
        for x, y in batches():
            with accelerator.accumulate(net):
                accelerator.backward(cross_entropy(net(x), y))
                opt.step()
                opt.zero_grad()
                update.keep(x, y)
                update.step()


def test_accelerate_checkpoint(accelerate, tmp_path):
    def run(part, model, load, save):
        accelerator = accelerate()
        net, opt = accelerator.prepare(model, SGD(model.parameters()))
        update = ComplementUpdate(net, opt)
        if load:
            accelerator.load_state(tmp_path / 'state')
        for x, y in part:
            accelerator.backward(cross_entropy(net(x), y))
            opt.step()
            opt.zero_grad()
            update.keep(x, y)
            update.step()
        if save:
            accelerator.save_state(tmp_path / 'state')
        return model

    oracle, _ = written_out(network('plain'), updates(batches(), 1))
    run(batches()[:5], network('plain'), False, True)
    same(run(batches()[5:], network('plain'), True, False), oracle, network('plain'))


# Lightning's manual optimization


def lightning_module(model, n=1, clip=None, second=None, forced=False):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = model

        def configure_optimizers(self):
            opt = SGD(self.net.parameters())
            return [opt, SGD(self.net.parameters())] if second == 'listed' else opt

        def on_train_start(self):
            opts = self.optimizers()
            opt, other = (
                opts if second == 'listed' else (opts, dict(shared=opts).get(second))
            )
            self.complement = ComplementUpdate(
                self.net,
                opt,
                other,
                clip=clip if second is None or forced else None,
                backward=lambda loss: self.manual_backward(loss / n),
            )

        def on_before_optimizer_step(
            self, optimizer
        ):  # called by the steps of Lightning's optimizers
            if clip:
                nn.utils.clip_grad_norm_(self.net.parameters(), clip)

        def training_step(self, batch, i):
            x, y = batch
            opt = self.optimizers()
            opt = opt[0] if second == 'listed' else opt
            self.manual_backward(nn.functional.cross_entropy(self.net(x), y) / n)
            self.complement.keep(x, y)
            if (i + 1) % n == 0 or self.trainer.is_last_batch:
                opt.step()
                opt.zero_grad()
                self.complement.step()

    return Module()


def lightning_fit(module, micro, ckpt_path=None, max_epochs=2, **kwargs):
    import lightning

    loader = torch.utils.data.DataLoader(micro, batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        accelerator='cpu',
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize('n, clip', [(1, None), (2, 0.05), (3, None)])
@pytest.mark.parametrize('second', [None, 'listed', 'shared'])
@pytest.mark.parametrize('scaler', [False, True])
def test_lightning(n, clip, second, scaler):
    pytest.importorskip('lightning')
    from lightning.pytorch.plugins.precision import MixedPrecision

    oracle, _ = written_out(
        network('still'),
        updates(batches(), n) * 2,
        second='shared' if second == 'shared' else None,
        n=n,
        clip=clip,
    )
    plugins = (
        [MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu'))]
        if scaler
        else None
    )
    model = network('still')
    lightning_fit(lightning_module(model, n, clip, second), batches(), plugins=plugins)
    same(model, oracle, network('still'))


@pytest.mark.parametrize('scaler', [False, True])
def test_lightning_in_one_call(scaler):
    lightning = pytest.importorskip('lightning')
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization, self.net = False, network('still')

        def configure_optimizers(self):
            return [SGD(self.net.parameters()), SGD(self.net.parameters())]

        def training_step(self, batch, i):
            complement_step(
                self.net,
                nn.CrossEntropyLoss(),
                *self.optimizers(),
                *batch,
                backward=self.manual_backward,
            )

    oracle, _ = written_out(network('still'), updates(batches(), 1) * 2)
    module = Module()
    plugins = (
        [MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu'))]
        if scaler
        else None
    )
    lightning_fit(module, batches(), plugins=plugins)
    same(module.net, oracle, network('still'))


def test_lightning_half_precision():
    pytest.importorskip('lightning')
    micro = [(x.float(), y) for x, y in batches()]
    oracle, _ = written_out(
        network('still').float(),
        updates(micro, 1) * 2,
        context=lambda: torch.autocast('cpu', torch.bfloat16),
        losses=LIBRARY,
    )
    model = network('still').float()
    lightning_fit(lightning_module(model), micro, precision='bf16-mixed')
    same(model, oracle, network('still').float(), eps=1e-2)


def test_lightning_checkpoint(tmp_path):
    "The second optimizer's state goes with the first one's."
    pytest.importorskip('lightning')
    oracle, _ = written_out(network('plain'), updates(batches(), 1) * 2)
    trainer = lightning_fit(lightning_module(network('plain')), batches(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / 'one.ckpt')
    model = network('plain')
    lightning_fit(lightning_module(model), batches(), ckpt_path=tmp_path / 'one.ckpt')
    same(model, oracle, network('plain'))


def test_lightning_refuses_to_clip_scaled_gradients():
    pytest.importorskip('lightning')
    from lightning.pytorch.plugins.precision import MixedPrecision

    module = lightning_module(network('plain'), second='listed', clip=0.05, forced=True)
    with pytest.raises(ValueError, match='on_before_optimizer_step'):
        lightning_fit(
            module,
            batches(),
            plugins=[MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu'))],
        )


# A Hugging Face Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, dtype=torch.double):
        self.x, self.y = (torch.cat(t) for t in zip(*batches()))
        self.x = self.x.to(dtype)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return dict(pixels=self.x[i], labels=self.y[i])


class Counts(Named):
    "Takes the number of labels of the whole update, as the models of the library do."

    def forward(self, pixels, labels=None, **kwargs):
        out = super().forward(pixels, labels)
        items = kwargs.get('num_items_in_batch')
        if items is not None and labels is not None:
            out['loss'] = out['loss'] * len(labels) / items
        return out


def hf_trainer(
    model,
    folder,
    n=1,
    clip=0.0,
    resume=None,
    steps=None,
    cot=True,
    size=8,
    optimizer='second',
    logs=0,
    dtype=torch.double,
    own=False,
    data=None,
    decay=0.9,
    compute_loss_func=None,
    **kwargs,
):
    transformers = pytest.importorskip('transformers')

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=n,
        max_grad_norm=clip,
        use_cpu=True,
        report_to='none',
        disable_tqdm=True,
        logging_strategy='steps' if logs else 'no',
        logging_steps=logs or 500,
        save_strategy='steps' if steps else 'no',
        save_steps=steps or 500,
        **kwargs,
    )
    opt = SGD(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: decay**i)
    trainer = InOrder(
        model,
        args,
        train_dataset=data or Rows(dtype),
        optimizers=(None, None) if own else (opt, schedule),
        compute_loss_func=compute_loss_func,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if cot:
        complement_trainer(trainer, optimizer=optimizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize('n, clip', [(1, 0.0), (2, 0.05), (3, 0.0)])
@pytest.mark.parametrize('optimizer', ['second', 'shared'])
def test_trainer(tmp_path, n, clip, optimizer):
    oracle, losses = written_out(
        network('still'),
        updates(batches(), n) * 2,
        clip=clip,
        schedule=lambda i: 0.1 * 0.9**i,
        second=None if optimizer == 'second' else 'shared',
    )
    model = Named(network('still'), 'dict')
    trainer = hf_trainer(model, tmp_path, n, clip, optimizer=optimizer, logs=1)
    same(model.net, oracle, network('still'))
    if n == 1:
        shown = [
            row['complement_loss'] for row in trainer.state.log_history if 'loss' in row
        ]
        assert shown == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize('size, n', [(8, 2), (7, 3), (9, 2)])
def test_trainer_that_counts_labels(tmp_path, size, n):
    "An update whose last micro-batch is smaller is still the mean over samples: one big batch."
    oracle, _ = written_out(
        network('plain'),
        updates(batches(size * n), 1) * 2,
        clip=0.05,
        schedule=lambda i: 0.1 * 0.9**i,
    )
    model = Counts(network('plain'), 'dict')
    hf_trainer(model, tmp_path, n, 0.05, size=size)
    same(model.net, oracle, network('plain'))


def test_trainer_with_its_own_optimizer(tmp_path):
    adamw = partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.0)
    oracle, _ = written_out(
        network('plain'),
        updates(batches(), 1) * 2,
        adamw,
        clip=1.0,
        schedule=lambda i: 5e-3 * (1 - i / 22),
    )
    model = Named(network('plain'), 'dict')
    hf_trainer(model, tmp_path, clip=1.0, own=True, learning_rate=5e-3)
    same(model.net, oracle, network('plain'))


@pytest.mark.parametrize('n', [1, 2])
def test_trainer_with_a_model_of_transformers(tmp_path, n):
    "A tiny one, with padded batches. (BERT's own loss leaves accumulation out of account, so a function counts the labels.)"
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).double()
    oracle, start = copy.deepcopy(model), copy.deepcopy(model)
    rows = []
    for i in range(22):
        mask = (torch.arange(6) < 3 + i % 4).long()
        rows.append(
            dict(
                input_ids=(torch.arange(6) * 7 + i * i) % 19 * mask + mask,
                attention_mask=mask,
                labels=torch.tensor(i % 4),
            )
        )
    opts = [SGD(oracle.parameters()) for _ in range(2)]
    for i in [*range(0, 22, 8)] * 2:
        batch = {k: torch.stack([row[k] for row in rows[i : i + 8]]) for k in rows[0]}
        y = batch.pop('labels')
        for opt, loss in zip(opts, (cross_entropy, complement)):
            opt.zero_grad()
            loss(oracle(**batch).logits, y).backward()
            nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
            opt.step()

    def counted(out, labels, num_items_in_batch):
        return (
            nn.functional.cross_entropy(out.logits, labels, reduction='sum')
            / num_items_in_batch
        )

    hf_trainer(
        model,
        tmp_path,
        n,
        0.5,
        size=8 // n,
        data=rows,
        decay=1.0,
        compute_loss_func=counted if n > 1 else None,
    )
    same(model, oracle, start)


def test_trainer_evaluates_and_trains_on(tmp_path):
    "Evaluation keeps no batch; a second `train` begins with a new schedule."
    model = Named(network('plain'), 'dict')
    trainer = hf_trainer(model, tmp_path, 2)
    oracle, _ = written_out(
        copy.deepcopy(model.net),
        updates(batches(), 2) * 2,
        schedule=lambda i: 0.1 * 0.9**i,
    )
    trainer.evaluate(trainer.train_dataset)
    assert not trainer.complement_update.kept
    trainer.optimizer.state.clear()
    trainer.lr_scheduler = None
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda i: 0.9**i
    )
    for group in trainer.optimizer.param_groups:
        group['lr'] = 0.1
    trainer.train()
    same(model.net, oracle, network('plain'))


def test_trainer_bf16(tmp_path):
    micro = [(x.float(), y) for x, y in batches()]
    oracle, _ = written_out(
        network('still').float(),
        updates(micro, 2) * 2,
        clip=0.05,
        schedule=lambda i: 0.1 * 0.9**i,
        context=lambda: torch.autocast('cpu', torch.bfloat16),
        losses=[lambda z, y, loss=loss: loss(z.float(), y) for loss in LIBRARY],
    )
    model = Named(network('still').float(), 'dict')
    hf_trainer(model, tmp_path, 2, 0.05, bf16=True, dtype=torch.float)
    same(model.net, oracle, network('still').float(), eps=1e-3)


def test_trainer_checkpoint(tmp_path):
    whole, parts = Named(network('plain'), 'dict'), Named(network('plain'), 'dict')
    oracle, _ = written_out(
        network('plain'), updates(batches(), 2) * 2, schedule=lambda i: 0.1 * 0.9**i
    )
    hf_trainer(whole, tmp_path / 'a', 2, steps=5)
    same(whole.net, oracle, network('plain'))
    hf_trainer(parts, tmp_path / 'b', 2, resume=tmp_path / 'a' / 'checkpoint-5')
    same(parts.net, oracle, eps=1e-8)


def test_trainer_refusals(tmp_path):
    trainer = hf_trainer(Named(network(), 'dict'), tmp_path)
    with pytest.raises(ValueError, match='already'):
        complement_trainer(trainer)
    with pytest.raises(ValueError, match="unknown optimizer 'secnd'"):
        complement_trainer(
            hf_trainer(Named(network(), 'dict'), tmp_path, cot=False), optimizer='secnd'
        )


# Several processes

CASES = dict(
    plain={},
    clipped=dict(clip=0.05),
    accumulated=dict(n=2, clip=0.05),
    three=dict(n=3),
    one_call=dict(n=2, clip=0.05, one_call=True),
    shared=dict(n=2, second='shared'),
    explicit=dict(n=2, explicit=True),
)
TRAINERS = dict(plain={}, accumulated=dict(n=2, clip=0.05))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def work(path):
    "One of the two processes."
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    rank, results = int(os.environ['RANK']), {}
    for name, how in CASES.items():
        AcceleratorState._reset_state(False)
        GradientState._reset_state()
        how = dict(how)
        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=how.pop('n', 1)
        )
        assert accelerator.num_processes == 2
        results[name] = flat(
            accelerated(accelerator, network('plain'), batches(4), epochs=2, **how)
        )
    for name, how in TRAINERS.items():
        AcceleratorState._reset_state(False)
        GradientState._reset_state()
        model = Named(network('plain'), 'dict')
        hf_trainer(model, f'{path}.trainer', size=4, ddp_backend='gloo', **how)
        results[f'trainer, {name}'] = flat(model)
    with open(f'{path}.{rank}', 'w') as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "What each of two processes ended with."
    pytest.importorskip('accelerate')
    pytest.importorskip('transformers')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    path = tmp_path_factory.mktemp('distributed') / 'result'
    common = dict(
        os.environ,
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        OMP_NUM_THREADS='1',
        ACCELERATE_USE_CPU='true',
        CUDA_VISIBLE_DEVICES='',
    )
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(path)],
            env=dict(common, RANK=str(i), LOCAL_RANK=str(i)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [w.communicate(timeout=300)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    for w, output in zip(workers, outputs):
        assert w.returncode == 0, output
    return [json.loads(path.with_name(f'result.{i}').read_text()) for i in range(2)]


@pytest.mark.parametrize('case', [*CASES, *(f'trainer, {name}' for name in TRAINERS)])
def test_two_processes(two_processes, case):
    "Two processes with batches of 4 are one with batches of 8."
    trainer = case.startswith('trainer')
    how = TRAINERS[case.split(', ')[1]] if trainer else CASES[case]
    n = how.get('n', 1)
    oracle, _ = written_out(
        network('plain'),
        updates(batches(8), n) * 2,
        n=None if trainer else n,
        clip=how.get('clip'),
        second=how.get('second'),
        schedule=(lambda i: 0.1 * 0.9**i) if trainer else None,
    )
    assert apart(oracle, network('plain')) > 1e-2
    for process in two_processes:
        assert process[case] == pytest.approx(flat(oracle), abs=1e-12)


# What is imported


def test_imports_torch_only():
    code = (
        'import sys; import complement_objectives.two_updates\n'
        "print([m for m in sys.modules if m.split('.')[0] in ('fastai', 'fastcore', 'matplotlib', 'pandas', 'foolbox', 'torchvision', "
        "'accelerate', 'lightning', 'transformers', 'scipy', 'sklearn')])"
    )
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == '[]', out.stdout


if __name__ == '__main__':
    work(sys.argv[1])
