"""Other architectures in the place of the Transformer, and their experiment.

    python -m experiments.architectures --SEEDS=5        accuracy against state and parameters

Each model is a class that MODEL can name, as --MODEL=experiments.architectures:LSTMModel. They are
meta-trained and tested as the Transformer is. The layers of the first three are in recurrent.py.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

import gpicl_minimal_replication as gpicl
from experiments import recurrent, sweep
from experiments.figures import distinct, mean_interval, rank_correlation, select
from experiments.muon import MuonTransformer, WithMuon
from gpicl_minimal_replication import C


class SequenceModel(WithMuon, gpicl.Transformer):
    """gpicl.Transformer with another layer, `mixer`, in the place of attention, and with Muon."""

    def predict(self, x, x_before, y_before, mask, cache=None):
        """Return logits (B, T, C) as Transformer.predict; raise UserError if there is a cache."""
        if cache is not None:
            raise gpicl.UserError(f"{type(self).__name__} cannot answer many queries after one "
                                  "context; use a MODEL with attention.")
        return super().predict(x, x_before, y_before, mask)


class LSTMModel(SequenceModel):
    """LSTM. On pairs its first layer starts as nearest centroid; else it may stay at chance."""
    mixer = recurrent.LSTM

    def __init__(self, settings):
        super().__init__(settings)
        if self.pairs:
            recurrent.start_with_class_means(self.layers[0].mixer, self.embed_label.weight)


class OuterProductLSTMModel(LSTMModel):
    """LSTM with a matrix per head for a cell; starts as LSTMModel does."""
    mixer = recurrent.OuterProductLSTM


class DeltaNetModel(SequenceModel):
    """Gated DeltaNet."""
    mixer = recurrent.GatedDeltaNet


class NoMixing(nn.Module):
    """Takes attention's place and adds nothing."""

    def __init__(self, settings, first):
        super().__init__()

    def forward(self, h, *inputs):
        return torch.zeros_like(h)


class MLPModel(SequenceModel):
    """Sees its own token only, and so can do no more than memorise (paper, heat maps)."""
    mixer = NoMixing


class VSML(nn.Module):
    """Variable shared meta-learning (Kirsch and Schmidhuber 2021): weights that are tiny LSTMs.

    Between every input a and output b is an LSTM with a state of `cell_size`, all with the same few
    parameters. It gets messages from both and sends some back. The inputs are the numbers of A x_i,
    the outputs are the classes; their order makes no difference: the symmetries of a learning
    algorithm are built in. Nor does their number: meta-training is on the first `training_inputs`,
    which is quicker, meta-test on all.
    """
    cell_size = 8
    training_inputs = 64

    def __init__(self, settings):
        super().__init__()
        n, self.outputs = self.cell_size, C
        self.images = 2 if settings.TOKEN_FORMAT == "pairs" else 1       # in a token
        self.read_images = self.read_labels = self.head = nn.Identity()
        self.forward_message = nn.Linear(self.images, 4 * n)
        self.backward_message = nn.Linear(2, 4 * n)
        self.recurrent = nn.Linear(n, 4 * n, bias=False)
        self.up = nn.Linear(n, 1, bias=False)

    def forward(self, x, y):
        """Return logits (B, T, C) for x (B, T, P) and y (B, T), one example after another."""
        if torch.is_grad_enabled():
            x = x[..., :self.training_inputs]
        images = torch.stack([x, gpicl.previous(x)][:self.images], -1)
        images = self.read_images(images.flatten(2)).unflatten(2, (-1, self.images))
        # A state's numbers stand first and the inputs last, so that all arithmetic is on long rows.
        messages = self.forward_message(images).permute(1, 3, 0, 2).contiguous()   # (T, 4 n, B, A)
        labels = gpicl.previous(F.one_hot(y, C).to(x.dtype))
        cell = h = x.new_zeros(self.cell_size, self.outputs, *messages.shape[2:])
        logits, outputs = x.new_zeros(len(x), C), []
        for message, label in zip(messages, labels.unbind(1)):
            back = torch.stack([label, logits.softmax(-1) * label.sum(-1, keepdim=True)], -1)
            back = self.read_labels(back.flatten(1)).unflatten(1, (-1, 2))
            back = self.backward_message(back).permute(2, 1, 0)[..., None]
            gates = (self.recurrent.weight @ h.flatten(1)).view(-1, *h.shape[1:])
            f, i, o, new = (gates + message[:, None] + back).chunk(4)
            cell = (f + 2).sigmoid() * cell + i.sigmoid() * new.tanh()
            h = o.sigmoid() * cell.tanh()
            logits = self.head(self.up(h.sum(-1).permute(2, 1, 0))[..., 0] / h.shape[-1]**0.5)
            outputs.append(logits)
        return torch.stack(outputs, 1)


class VSMLAsymmetric(VSML):
    """VSML whose symmetries learnt matrices at its inputs and outputs break (as in the paper).

    It has MODEL_SIZE inputs and as many outputs. The matrices start as a projection and as
    identities: as VSML of fewer numbers.
    """
    training_inputs = None

    def __init__(self, settings):
        super().__init__(settings)
        self.outputs = size = settings.MODEL_SIZE
        self.read_images = nn.Linear(self.images * settings.PROJECTION_SIZE, self.images * size)
        self.read_labels = nn.Linear(2 * C, 2 * size)
        self.head = nn.Linear(size, C)
        for layer in (self.read_images, self.read_labels, self.head):
            nn.init.zeros_(layer.bias)
        nn.init.eye_(self.read_labels.weight)
        nn.init.eye_(self.head.weight)
        projection = F.normalize(torch.randn(size, settings.PROJECTION_SIZE))
        self.read_images.weight.data = torch.kron(projection, torch.eye(self.images))


class MAML(nn.Module):
    """Model-agnostic meta-learning (Finn, Abbeel, Levine 2017): a start to descend from.

    Learnt are the first weights of a network with one hidden layer, and a rate for every tensor and
    step (Antoniou et al. 2019). Some steps of gradient descent on the context adapt the weights;
    the adapted network answers the queries: the last quarter of the sequence in meta-training, else
    the last example. All logits before are zero, which is no answer.
    """

    def __init__(self, settings, steps=5):
        super().__init__()
        inputs, hidden = settings.PROJECTION_SIZE, settings.MODEL_SIZE
        shapes = (inputs, hidden), (1, hidden), (hidden, C), (1, C)
        self.start = nn.ParameterList(
            torch.randn(shape) * (shape[0] > 1) * (2 / shape[0])**0.5 for shape in shapes)
        self.log_rates = nn.Parameter(torch.full((steps, len(shapes)), math.log(0.1)))

    def forward(self, x, y):
        """Return logits (B, T, C) for x (B, T, P) and y (B, T)."""
        T, training = x.shape[1], torch.is_grad_enabled()
        n = T - max(1, T // 4) if training else T - 1

        def network(x, w, b, v, c):
            return (x @ w + b).relu() @ v + c

        with torch.enable_grad():
            weights = [w.expand(len(x), *w.shape) for w in self.start]
            for rates in self.log_rates.exp():
                loss = F.cross_entropy(network(x[:, :n], *weights).flatten(0, 1),
                                       y[:, :n].flatten(), reduction="sum") / n
                slopes = torch.autograd.grad(loss, weights, create_graph=training)
                weights = [w - rate * s for w, rate, s in zip(weights, rates, slopes)]
        return F.pad(network(x[:, n:], *weights), (0, 0, n, 0))


# ------------------------------------------------- is it the state that matters, or the parameters?
class SmallVSML(VSML):
    """VSML of smaller LSTMs."""
    cell_size = 4


TITLE = "Accuracy against state and against parameters"
SETTINGS = dict(
    IMAGE_SIZE=8, NUM_EXAMPLES=30, PROJECTION_SIZE=64, IMAGE_QUERIES=False, MERGED_FRACTION=0.0,
    NUM_LAYERS=2, MLP_SIZE=128, ATTENTION_SCALE=16.0, OUTPUT_STD=1.0,
    STEPS=1000, LEARNING_RATE=3e-3, DECAY_FRACTION=0.3, EVAL_SEQUENCES=1024)
OWN = "experiments.architectures:"
LABELS = {"experiments.muon:MuonTransformer": "Transformer",
          f"{OWN}DeltaNetModel": "gated DeltaNet",
          f"{OWN}LSTMModel": "LSTM", f"{OWN}OuterProductLSTMModel": "outer-product LSTM",
          f"{OWN}SmallVSML": "VSML", f"{OWN}VSML": "VSML",
          f"{OWN}VSMLAsymmetric": "VSML, not symmetric"}
SIZES = {"experiments.muon:MuonTransformer": [dict(MODEL_SIZE=size) for size in (32, 64, 128)],
         f"{OWN}DeltaNetModel": [dict(MODEL_SIZE=size) for size in (32, 64, 128)],
         f"{OWN}LSTMModel": [dict(MODEL_SIZE=size) for size in (64, 128, 256)],
         f"{OWN}OuterProductLSTMModel": [
             dict(MODEL_SIZE=size, NUM_HEADS=heads, LEARNING_RATE=rate)
             for size, heads, rate in ((32, 2, 1e-3), (64, 4, 1e-3), (128, 4, 3e-4))],
         f"{OWN}VSMLAsymmetric": [dict(MODEL_SIZE=size) for size in (12, 16)]}
CELLS = [dict(MODEL=model, **sizes) for model in LABELS for sizes in SIZES.get(model, [{}])]
COMPARED = ("MODEL",)


def state_size(model, settings):
    """Return how many numbers a model carries from one example to the next."""
    D, width = settings.MODEL_SIZE, settings.MODEL_SIZE // settings.NUM_HEADS
    if isinstance(model, VSML):
        pairs = D * D if isinstance(model, VSMLAsymmetric) else settings.PROJECTION_SIZE * C
        return 2 * model.cell_size * pairs
    return settings.NUM_LAYERS * {                       # a Transformer's are its keys and values
        MuonTransformer: 2 * settings.NUM_EXAMPLES * D, DeltaNetModel: D * width,
        LSTMModel: 2 * D, OuterProductLSTMModel: D * width + D}[type(model)]


def measure(settings, data, precision):
    """Return the accuracy at the end of the sequence beside the sizes of state and parameters."""
    training, _, tests = data
    model = sweep.trained_model(settings, training, precision)
    return [dict(tested_on=name, state=state_size(model, settings),
                 parameters=sum(p.numel() for p in model.parameters()),
                 accuracy=sweep.first_and_last(model, dataset, settings, precision)[1])
            for name, dataset in tests.items()]


def report(rows, figure):
    """Two panels, with rank correlations and their bootstrapped intervals over the models."""
    figure.set_size_inches(14, 5.5)
    lines, points, tested_on = [], [], rows[0]["tested_on"]
    for model in dict.fromkeys((row["MODEL"], row["state"], row["parameters"]) for row in rows):
        of_model = select(rows, **dict(zip(("MODEL", "state", "parameters"), model)))
        name, state, parameters = LABELS[model[0]], *model[1:]
        lines.append(f"{name:20}{state:9,} state{parameters:11,} parameters")
        for kind in distinct(of_model, "tested_on"):
            mean, half = mean_interval(select(of_model, tested_on=kind), "accuracy")
            lines[-1] += f"   {kind} {100 * mean:.1f} ± {100 * half:.1f}".replace(" ± nan", "")
            if kind == tested_on:
                points.append((name, state, parameters, 100 * mean, 100 * half))
    for panel, column, words in zip(figure.subplots(1, 2, sharey=True), (1, 2), (
            "numbers of state", "parameters")):
        value, low, high = rank_correlation(*([point[i] for point in points] for i in (column, 3)))
        correlation = f"rank correlation with {words} {value:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"{tested_on}, {len(points)} models: {correlation}")
        for name in dict.fromkeys(point[0] for point in points):         # a line joins the sizes
            sizes = [point for point in points if point[0] == name]
            panel.errorbar(*([point[i] for point in sizes] for i in (column, 3, 4)), marker="o",
                           ms=4, capsize=3, label=name)
        panel.axhline(100 / C, color="k", lw=1, ls=":", label="chance")
        panel.set(title=correlation, xlabel=words, xscale="log",
                  ylabel=f"accuracy (%) on the last examples, {tested_on}")
    return lines


if __name__ == "__main__":
    sys.exit(sweep.main("architectures", sys.argv[1:]))
