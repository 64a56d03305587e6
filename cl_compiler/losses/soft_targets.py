"""Soft targets from a teacher whose own similarity matrix is made tile by tile, too."""

from cl_compiler import lang as cl


@cl.define_loss
def distillation(sim, logit_scale, teacher_scale):
    """Cross-entropy of the student's softmax with the teacher's (open_clip's, one direction).

    Takes ``teacher_x`` [M, T] and ``teacher_y`` [N, T]; the teacher may train, too.
    """
    teacher = cl.similarity(cl.operand("teacher_x", cl.rows), cl.operand("teacher_y", cl.cols))
    s = logit_scale * sim
    target = cl.softmean(s, teacher_scale * teacher, over=cl.cols)
    return cl.mean(cl.logsumexp(s, over=cl.cols) - target, over=cl.rows)
