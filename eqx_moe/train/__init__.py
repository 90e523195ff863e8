"""Training: batches from text, the loss, the step, the loop."""

from eqx_moe.errors import DataError as DataError
from eqx_moe.train.batch import Batch as Batch
from eqx_moe.train.data import Rows as Rows
from eqx_moe.train.data import batches as batches
from eqx_moe.train.data import in_order as in_order
from eqx_moe.train.data import pack as pack
from eqx_moe.train.data import read_texts as read_texts
from eqx_moe.train.data import tokenize as tokenize
from eqx_moe.train.data import windows as windows
from eqx_moe.train.loop import DivergedError as DivergedError
from eqx_moe.train.loop import Evaluation as Evaluation
from eqx_moe.train.loop import adamw as adamw
from eqx_moe.train.loop import are_matrices as are_matrices
from eqx_moe.train.loop import evaluate as evaluate
from eqx_moe.train.loop import fit as fit
from eqx_moe.train.loop import init_optimizer as init_optimizer
from eqx_moe.train.loop import make_step as make_step
from eqx_moe.train.losses import loss as loss
from eqx_moe.train.plan import StepPlan as StepPlan
from eqx_moe.train.plan import plan_step as plan_step
