"""The table of all checks: how bad it is, what it means, and what to do.

Ingredients that a row leaves out are not looked at by the rows after it, so
that each has the first reason that applies.
"""

from jaxsoup.diagnosis import _files
from jaxsoup.diagnosis import _scores
from jaxsoup.diagnosis import _weights
from jaxsoup.diagnosis._case import Check

_BASINS = 'Their units do not correspond, and the average is noise.'
_LABELS = 'The outputs of the heads mean different classes.'
_OUT = 'Leave out {them}.'
_CONVERT = (
    'Find the conversion that did it, and convert again; or leave out {them}.'
)

# Before numbers are compared: what these leave out has no score.
OF_FILES = (
    Check(
        'structure', _files.structure, 'error',
        'Not all have the same architecture',
        'Only leaves of one shape can be averaged.',
        'If only the heads differ, soup the subtrees that agree, such as '
        "[p['backbone'] for p in ingredients]. Otherwise leave out {them}.",
    ),
    Check(
        'dtype', _files.dtype, 'warning',
        'Ingredients are stored in different dtypes',
        'Recipes do not mix dtypes: it is not clear which one the soup should '
        'have.',
        'Cast all to the wider dtype: --dtype float32, or jax.tree.map(lambda '
        'x: x.astype(jnp.float32), params); or leave out {them}.',
    ),
    Check(
        'integers', _files.integers, 'error', 'Integers or booleans differ',
        'Only floats are averaged, so a recipe refuses these models. Integers '
        'that differ may be quantized weights, or masks.',
        'Convert quantized weights to floats, or pass parameters without these '
        'leaves.',
    ),
    Check(
        'labels', _files.file('config.json', keys=('id2label', 'label2id')),
        'error',
        'Another order of labels', _LABELS,
        'Put the rows of the head in the order of the others; or leave out '
        '{them}.',
    ),
    Check(
        'tokenizer',
        _files.file('tokenizer.json', 'vocab.json', 'tokenizer_config.json'),
        'error',
        'Another tokenizer',
        'A row of the embeddings belongs to different tokens.',
        'If the tokens are the same in another order: --align-tokens. '
        'Otherwise leave out {them}.',
    ),
    Check(
        'preprocessing',
        _files.file('preprocessor_config.json', 'processor_config.json'),
        'warning',
        'Inputs were preprocessed differently',
        'Each model expects the inputs that it was trained on; a soup gets one '
        'kind.',
        'Train with one preprocessing; or leave out {them}.',
    ),
    Check(
        'refused', _files.averageable, 'error',
        'Recipes refuse this checkpoint',
        'Its leaves are not the weights of a whole model, or mean other '
        'things.',
        _OUT,
    ),
    Check(
        'damaged', _files.damaged, 'error', 'Files are damaged',
        'The values are not those that were saved, and would go into the soup.',
        'Restore the files from a copy, or leave out {them}.',
    ),
    Check(
        'not_finite', _files.not_finite, 'error',
        'Weights that are NaN or infinite',
        'One NaN makes the soup NaN. The training diverged, or the file is '
        'damaged.',
        'Leave out {them}; check the loss of that training.',
    ),
)  # fmt: skip

# Of the weights.
OF_WEIGHTS = (
    Check(
        'duplicate', _weights.duplicate, 'warning',
        'The same model more than once',
        'It would count several times. Perhaps a run was not saved where you '
        'expect it.',
        _OUT,
    ),
    Check(
        'unmoved', _weights.is_start, 'warning', 'Not fine-tuned',
        'It is the initialization, and pulls the soup back to it.',
        'Leave out {them}: perhaps the initial checkpoint is among the runs. '
        'To average theta_0 and a soup, use WiSE-FT: jaxsoup.interpolate.',
        True,
    ),
    Check(
        'start', _weights.start, 'warning',
        'theta_0 is not what they were fine-tuned from',
        'Task vectors, and recipes that need theta_0 (Model Stock, WiSE-FT), '
        'would be wrong. The other findings do not use it.',
        'Pass the checkpoint that fine-tuning started from.', True, False,
    ),
    Check(
        'moments', _weights.moments, 'error',
        'Moments of an optimizer, not parameters',
        'These are not the weights of a model.',
        'Read the parameters: --item params, or the right subtree of the '
        'training state; or leave out {them}.',
    ),
    Check(
        'transposed', _weights.match('transposed'), 'error',
        'A matrix is transposed',
        _BASINS, _CONVERT,
    ),
    Check(
        'swapped', _weights.match('swapped'), 'error',
        'Layers or matrices have changed places', _BASINS, _CONVERT,
    ),
    Check(
        'permuted', _weights.match('permuted'), 'error',
        'The hidden units are in a different order',
        'The same function with its units (or attention heads) in a different '
        'order: an average adds units that do not correspond.',
        'Put the units in the order of the others: params = '
        'jaxsoup.diagnosis.aligned(params, like=another), and score it; or '
        'leave out {them}.',
    ),
    Check(
        'labels', _weights.match('labels'), 'error', 'Another order of labels',
        _LABELS,
        'Put the outputs in the order of the others: '
        'jaxsoup.diagnosis.aligned(params, like=another); or leave out {them}.',
    ),
    Check(
        'rotated', _weights.match('rotated'), 'error',
        'Matrices are rotated, their product is not',
        'The same attention in other coordinates. ' + _BASINS, _CONVERT,
    ),
    Check(
        'initialization', _weights.initialization, 'error',
        'Not fine-tuned from the same initialization',
        'Models from different initializations lie in different basins. '
        + _BASINS,
        'Soup only models from one initialization. In a sweep, fix the seed of '
        'the initialization (and of a new head) and vary the other '
        'hyper-parameters. Otherwise use an ensemble.',
    ),
    Check(
        'part', _weights.part, 'error',
        'A part, perhaps the head, was initialized separately',
        'Heads that each run initialized at random (or that were never '
        'trained) do not correspond: in an average they cancel.',
        'Initialize the head once, or train it first (linear probe), and start '
        'all runs from it. For these runs: leave out {them}, or soup the rest '
        'and train one head on it.',
    ),
    Check(
        'rescaled', _weights.rescaled, 'error',
        'The same function with layers of other scales',
        'Units that are larger dominate the average, and what reads them has '
        'the wrong scale.',
        _CONVERT,
    ),
    Check(
        'untied', _weights.untied, 'warning', 'A tied copy has drifted',
        'Loaded as a tied model, one of the two is thrown away.',
        'Save the leaf that is used in both places; or leave out {them}.',
    ),
    Check(
        'soup_of_others', _weights.soup_of_others, 'warning',
        'An average of other ingredients is among them',
        'Its ingredients count twice.', _OUT,
    ),
    Check(
        'copies', _weights.copies, 'warning', 'Several copies of one run',
        'A moving average, or an earlier checkpoint, and its run are nearly '
        'the same model, which then counts twice.',
        'Use one copy of each run, of the same kind for all: only the moving '
        'averages, or only the last checkpoints.',
    ),
    Check(
        'unmoved', _weights.hardly, 'warning', 'Hardly fine-tuned',
        'It is almost the initialization, and pulls the soup back to it.',
        'Leave out {them}; the learning rate may be far too small.', True,
    ),
    Check(
        'far', _weights.far, 'warning', 'Moved much further than the others',
        'Its large weights dominate the average.',
        'Leave out {them}, or let a greedy soup choose. Lower the learning '
        'rate.',
        is_fact=False,
    ),
    Check(
        'rounding', _weights.rounding, 'warning',
        'Rounding is as large as the task vectors',
        'The difference between ingredients is mostly rounding, and a soup in '
        'their dtype is rounded again.',
        'Save runs in float32 (the master weights of the optimizer). For these '
        'runs: --dtype float32, and keep the soup in float32.',
        leaves_out=False,
    ),
    Check(
        'frozen', _weights.frozen, 'note', 'Parts that no run changed',
        'They were frozen, or got no gradient. Averages leave them as they '
        'are.',
        'Nothing, if this is intended. Otherwise check the mask of the '
        'optimizer, and look for parts that the loss does not use.',
        leaves_out=False,
    ),
    Check(
        'partly_frozen', _weights.partly_frozen, 'note',
        'Parts that only some runs trained',
        'Runs that train only a part (such as a linear probe) are mixed with '
        'runs that train everything.',
        'This can work. Compare with a soup of each kind alone.',
        leaves_out=False,
    ),
)  # fmt: skip

# Of held-out scores.
OF_SCORES = (
    Check(
        'labels', _scores.labels, 'error', 'Another order of labels', _LABELS,
        'Train with one order of labels, or reorder the outputs of the head; '
        'or leave out {them}.',
    ),
    Check(
        'batch_norm', _scores.batch_norm, 'error',
        'The running statistics of the average are wrong',
        'The statistics of a soup are not the mean of those of its '
        'ingredients: activations have other means and smaller variances.',
        'Re-estimate them on training examples.',
    ),
    Check(
        'barrier', _scores.barrier, 'error',
        'There are barriers between ingredients',
        'They lie in different basins: models between them, such as their '
        'average, are bad.',
        'Let a greedy soup choose some of them. For the next sweep: smaller '
        'learning rates, fewer epochs, or a better initialization.',
    ),
    Check(
        'unknown', _scores.unknown, 'error',
        'Cause unknown: these models do not fit the others',
        'None of the known causes explains it.',
        'Leave out {them}, and compare how it was trained and converted.',
    ),
    Check(
        'weak', _scores.weak(is_outside=False), 'warning',
        'Much worse than the others',
        'A uniform soup averages all, and these lower its score.',
        'Leave out {them}, or let a greedy soup choose.',
    ),
    Check(
        'unmoved', _scores.weak(is_outside=True), 'warning',
        'Not fine-tuned, or hardly',
        'It is the worst, and the others lie in one direction from it: as the '
        'initialization does, which pulls the soup back to it.',
        'Leave out {them}. Pass theta_0 (--init) to be sure.',
    ),
    Check(
        'uneven', _scores.uneven, 'note', 'The best model is ahead',
        'A uniform soup averages all, and the others lower its score.',
        'Let a greedy soup choose, or use the best one.', leaves_out=False,
    ),
    Check(
        'alike', _scores.alike, 'note',
        'All ingredients predict almost the same',
        'There is little to gain: soups need models that make different '
        'errors.',
        'Vary more between runs: learning rate, augmentation, seed.',
        leaves_out=False,
    ),
)  # fmt: skip
