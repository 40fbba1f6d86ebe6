"""The sections of a run's configuration that no method owns: frozen dataclasses, one a concern."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedprune.exchange.uplink import Uplink
from prunelab.data.reading import TEST_SHARE, reading
from prunelab.errors import DataError, close_names

PARTITIONS = ("iid", "dirichlet", "pathological", "natural")
VALUE_DTYPES = ("fp32", "fp16", "bf16", "int8")
DEVICES = ("cpu", "cuda")
EVALUATIONS = ("server", "clients")
AGGREGATIONS = ("mean", "clipped", "trimmed-mean", "median", "multi-krum")
DP = ("none", "central", "local")
NOISES = ("auto", "seed", "system")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "linear", "constant")
SERVER_OPTIMIZERS = ("none", "momentum", "adam", "yogi", "adagrad")
EXECUTIONS = ("auto", "sparse", "masked", "dense")
FLOAT32 = "float32"
PRECISIONS = (FLOAT32, "bfloat16")
CPU_COHORT = 4  # a compromise: no size stands out (benchmarks.gpu_simulation --cohorts)


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how clients share them.

    `num_train` and `num_test` cut a stratified subset; 0 keeps everything. `resize` brings pictures
    to one size ("32", "32x48"), `columns` says what columns are for ("image=picture,label=kind"),
    and `test_share` is set aside for the test where there is no test side. `augment` crops and
    mirrors training pictures at random.

    `partition` is "iid"; "dirichlet", with the concentration `alpha` (small = every client sees few
    classes); "pathological", `classes_per_client` classes each; "natural", by the data's own
    clients; or "module:function" of (labels, num_clients, seed) -> each client's indices.
    """

    dataset: str = "digits"
    clients: int = 8
    partition: str = "dirichlet"
    alpha: float = 0.5
    classes_per_client: int = 2
    resize: str = ""
    columns: str = ""
    test_share: float = TEST_SHARE
    num_train: int = 0
    num_test: int = 0
    augment: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Which network. An empty name stands for the data set's default, width 0 for the model's.

    `blocks` are the names of modules, separated by commas, at which the network is cut into blocks
    for methods that adjust one at a time; empty: found from its modules.
    """

    name: str = ""
    width: int = 0
    blocks: str = ""


@dataclass(frozen=True)
class TrainingConfig:
    """Local training of a client.

    `task` is what the model is trained for: a name in prunelab.training.task.TASKS or
    "module:function" that gives a Task; empty: what the samples are for. `optimizer` is "sgd" (with
    `momentum`), "adam", "adamw", or "module:function" that gives a rule (see
    fedprune/local/optimizer.py; `momentum` and `weight_decay` are not for it). `schedule`, of the
    learning rate over rounds, is "cosine", "linear", "constant", or "module:function" of (rounds
    done, rounds) -> factor. Gradients of a step are scaled down to the norm `clip_norm`; 0: never.

    `execution` is how a masked model is computed: "sparse" (active weights only), "masked",
    "dense", or "auto": sparse on a CPU that has the native kernels, else masked. On a GPU masked
    and dense training capture their step once and replay it, where it can be. `precision` is
    "float32", or "bfloat16": forward and backward passes of training under torch's autocast, which
    sparse execution does not have; weights, gradients and losses are float32. `cohort` is how
    many clients the batched engine trains at a time; 0: on a GPU as many of a round as its memory
    holds, which the first round measures, and CPU_COHORT on a CPU. `recompute` makes the sparse
    runtime compute some activations again in the backward pass instead of keeping them: the same
    bits, about half the memory, some more time.
    """

    rounds: int = 20
    local_epochs: int = 2
    batch_size: int = 32
    task: str = ""
    optimizer: str = "sgd"
    schedule: str = "cosine"
    clip_norm: float = 0.0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    device: str = "cpu"
    threads: int = 1
    execution: str = "auto"
    precision: str = FLOAT32
    cohort: int = 0
    recompute: bool = False


@dataclass(frozen=True)
class ServerConfig:
    """The start that every method shares, and the step that the server takes each round.

    The start is a brief training on a few labelled samples: `per_class` samples of each class are
    set aside from the training side for it; of samples without classes as many as ten classes
    would have.

    `optimizer` "none" takes the clients' mean; "momentum" (FedAvgM), "adam", "yogi" and "adagrad"
    take a step towards it (fedprune/rounds/server_optimizer.py) with the rate `lr`: about 1 for
    momentum, for the others the change of a weight in a round, .01 say. `momentum` is the decay of
    the first moment, `beta2` of the second, `tau` is added to its root.
    """

    per_class: int = 5
    pretrain_epochs: int = 3
    optimizer: str = "none"
    lr: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


@dataclass(frozen=True)
class FederationConfig:
    """Who takes part in a round. `clients_per_round` 0 asks everybody; `timeout` in seconds.

    A round needs usable answers of `quorum`: below 1 a share of the round's clients, from 1 on a
    number of them. Those that did not answer are asked again, up to `attempts` times in all, then
    the run ends. `over_sample` asks so many more clients than `clients_per_round` and takes the
    answers that come first: which ones decides the result, so that it is off by default.
    `node_keys` says that nodes have registered keys: a client is then its node's for the whole
    run. Without, a node that comes back with a new identity takes its place again.

    `aggregation` makes one model of the answers: "mean", or a rule that withstands lying clients
    (fedprune/exchange/robust.py): "clipped" (updates cut to the norm `clip`; 0: the median of the
    round's), "trimmed-mean", "median", "multi-krum". `byzantine` is the share of a round's clients
    that may lie; one that comes to less than a client is refused, but for 0.

    `max_share` is how much of a round's weight one client may have whose samples the run did not
    hand out: nobody but itself knows how many they are. 1 believes every number. `evaluate` says
    who tests the model after each round: the "server", on its test samples, or the "clients", each
    on a tenth of its own that neither trains nor chooses anything; then the server needs none.

    Values travel as `value_dtype`: "fp32", "fp16", "bf16" or "int8"; those of a trained model on
    its way up as `uplink_dtype` ("": the same), and of its weights the share `uplink_topk` alone
    that changed most, 1 for all. With `error_feedback` a client keeps what was lost that way and
    adds it to its next answer; a node that was restarted, or a run that is resumed, begins without.
    """

    clients_per_round: int = 0
    timeout: float = 600.0
    value_dtype: str = "fp32"
    uplink_dtype: str = ""
    uplink_topk: float = 1.0
    error_feedback: bool = True
    max_share: float = 0.5
    evaluate: str = "server"
    quorum: float = 1.0
    attempts: int = 3
    over_sample: int = 0
    node_keys: bool = False
    aggregation: str = "mean"
    byzantine: float = 0.2
    clip: float = 0.0

    @property
    def uplink(self) -> Uplink:
        """How a trained model travels up."""
        return Uplink(self.uplink_dtype or self.value_dtype, self.uplink_topk, self.error_feedback)

    @property
    def clients_test(self) -> bool:
        """Whether clients test the model, and not the server."""
        return self.evaluate == "clients"


@dataclass(frozen=True)
class PrivacyConfig:
    """What the server learns of a single client; docs/security.md says against whom.

    With `secure_aggregation` it learns sums of answers alone: more than the share `threshold` of
    the clients asked has to stay until the end of a sum.

    `dp` is differential privacy of whole clients: "central" (the server adds noise to the mean),
    "local" (each client adds its own) or "none". A client's update is clipped to the norm `clip`;
    the noise of a sum, or of a client, has the deviation noise_multiplier · clip. Epsilon is told
    at `delta`. `noise` comes from the "system", which nobody can guess, or from the run's "seed",
    which a simulation can repeat and everybody can take away; "auto": the seed in simulations.
    """

    secure_aggregation: bool = False
    threshold: float = 0.5
    dp: str = "none"
    clip: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    noise: str = "auto"

    @property
    def hides_labels(self) -> bool:
        """Whether clients keep to themselves which classes they have."""
        return self.secure_aggregation or self.dp != "none"

    def seeds_noise(self, simulated: bool) -> bool:
        """Whether noise comes from the run's seed."""
        return self.noise == "seed" or (self.noise == "auto" and simulated)


def problems(
    *,
    data: DataConfig,
    model: ModelConfig,
    training: TrainingConfig,
    server: ServerConfig,
    federation: FederationConfig,
    privacy: PrivacyConfig,
) -> Iterable[str]:
    """Every reason why these sections cannot be used."""
    choices = {
        "federation.value_dtype": (federation.value_dtype, VALUE_DTYPES),
        "federation.uplink_dtype": (federation.uplink_dtype or "fp32", VALUE_DTYPES),
        "training.device": (training.device, DEVICES),
        "training.execution": (training.execution, EXECUTIONS),
        "training.precision": (training.precision, PRECISIONS),
        "server.optimizer": (server.optimizer, SERVER_OPTIMIZERS),
        "federation.evaluate": (federation.evaluate, EVALUATIONS),
        "federation.aggregation": (federation.aggregation, AGGREGATIONS),
        "privacy.dp": (privacy.dp, DP),
        "privacy.noise": (privacy.noise, NOISES),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            yield f"{key}: expected one of {', '.join(allowed)}; got {value!r}"
    yield from _unknown_functions(data, training)
    yield from _numbers(training)
    try:
        reading(resize=data.resize, columns=data.columns, test_share=data.test_share)
    except DataError as error:
        yield f"data: {error}"
    at_least_one = {
        "data.clients": data.clients,
        "data.classes_per_client": data.classes_per_client,
        "training.rounds": training.rounds,
        "training.local_epochs": training.local_epochs,
        "training.threads": training.threads,
        "server.per_class": server.per_class,
        "federation.attempts": federation.attempts,
    }
    for key, count in at_least_one.items():
        if count < 1:
            yield f"{key}: expected at least 1, got {count}"
    not_negative = {
        "data.num_train": data.num_train,
        "data.num_test": data.num_test,
        "model.width": model.width,
        "training.weight_decay": training.weight_decay,
        "training.clip_norm": training.clip_norm,
        "training.cohort": training.cohort,
        "server.pretrain_epochs": server.pretrain_epochs,
        "federation.clients_per_round": federation.clients_per_round,
        "federation.over_sample": federation.over_sample,
        "federation.clip": federation.clip,
    }
    for key, amount in not_negative.items():
        if not amount >= 0:
            yield f"{key}: expected 0 or more, got {amount}"
    yield from _who_takes_part(federation, clients=data.clients)
    yield from _private(data, federation, privacy)
    if training.batch_size < 2:
        yield f"training.batch_size: batch norm needs at least 2, got {training.batch_size}"
    for key, decay in (
        ("training.momentum", training.momentum),
        ("server.momentum", server.momentum),
        ("server.beta2", server.beta2),
    ):
        if not 0 <= decay < 1:
            yield f"{key}: expected 0 <= {key.partition('.')[2]} < 1, got {decay}"
    for key, number in (
        ("data.alpha", data.alpha),
        ("training.lr", training.lr),
        ("server.lr", server.lr),
        ("server.tau", server.tau),
        ("federation.timeout", federation.timeout),
        ("privacy.clip", privacy.clip),
        ("privacy.noise_multiplier", privacy.noise_multiplier),
    ):
        if not 0 < number < float("inf"):
            yield f"{key}: expected a positive number, got {number}"


def _who_takes_part(federation: FederationConfig, *, clients: int) -> Iterable[str]:
    if federation.over_sample > 0 and not federation.clients_per_round:
        yield "federation.over_sample: everybody is asked already; set federation.clients_per_round"
    if not 0 < federation.quorum < float("inf") or (
        federation.quorum > 1 and not federation.quorum.is_integer()
    ):
        yield (
            "federation.quorum: expected a share below 1 or a whole number of clients, got "
            f"{federation.quorum}"
        )
    asked = federation.clients_per_round or clients
    if federation.quorum > max(1, asked):
        yield (
            f"federation.quorum: {federation.quorum:g} answers of {asked} clients a round cannot "
            f"come; set it to {asked} or less"
        )
    if not 0 <= federation.byzantine < 0.5:
        yield f"federation.byzantine: expected 0 <= byzantine < 0.5, got {federation.byzantine}"
    elif federation.aggregation != "mean" and federation.byzantine > 0:
        answers = min(asked, clients)
        if answers > 0 and int(federation.byzantine * answers) == 0:
            yield (
                f"federation.byzantine: {federation.byzantine:g} of {answers} clients a round is "
                f"nobody, and {federation.aggregation} would protect from none; raise it, or ask "
                "more clients"
            )
    shares = {"uplink_topk": federation.uplink_topk, "max_share": federation.max_share}
    yield from (
        f"federation.{name}: expected 0 < {name} <= 1, got {share}"
        for name, share in shares.items()
        if not 0 < share <= 1
    )


def _private(
    data: DataConfig, federation: FederationConfig, privacy: PrivacyConfig
) -> Iterable[str]:
    """Settings of privacy out of their range, or that others do not go with."""
    for key, share in (("threshold", privacy.threshold), ("delta", privacy.delta)):
        if not 0 < share < 1:
            yield f"privacy.{key}: expected 0 < {key} < 1, got {share}"
    private = privacy.secure_aggregation or privacy.dp != "none"
    goes = "with privacy.secure_aggregation and privacy.dp"
    lossy = {
        "value_dtype": federation.value_dtype != "fp32",
        "uplink_dtype": federation.uplink_dtype not in {"", "fp32"},
        "uplink_topk": federation.uplink_topk < 1,
    }
    yield from (
        f"federation.{key}: it changes what the client has protected; leave it out {goes}"
        for key, does in lossy.items()
        if private and does
    )
    if private and federation.aggregation != "mean":
        yield (
            f"federation.aggregation: {federation.aggregation} compares single clients' values; "
            f'use "mean" {goes}'
        )
    if private and federation.over_sample:
        yield f"federation.over_sample: everybody who is asked counts {goes}; set it to 0"
    asked = federation.clients_per_round or data.clients
    if privacy.secure_aggregation and (asked == 1 or data.clients == 1):
        yield "privacy.secure_aggregation: a sum over one client is that client's; ask more"
    if privacy.dp != "none" and federation.clients_test:
        yield ('federation.evaluate: tests by clients are not covered by privacy.dp; use "server"')


def _numbers(training: TrainingConfig) -> Iterable[str]:
    if training.execution == "sparse" and training.precision != FLOAT32:
        yield (
            f"training.precision: sparse execution computes in {FLOAT32}; leave it at that, or "
            "choose another training.execution"
        )


def _unknown_functions(data: DataConfig, training: TrainingConfig) -> Iterable[str]:
    functions = {
        "data.partition": (data.partition, PARTITIONS),
        "training.optimizer": (training.optimizer, OPTIMIZERS),
        "training.schedule": (training.schedule, SCHEDULES),
    }
    for key, (value, known) in functions.items():
        if value not in known and ":" not in value:
            close = close_names(value, known)
            yield f"{key}: expected {', '.join(known)} or module:function; got {value!r}{close}"
