"""What the tests of several figures look for in one."""

from probattn.inference import figures as plots


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def collection(axes, gid):
    [found] = [each for each in axes.collections if each.get_gid() == gid]
    return found


def text_figure(tokens, margin, **options):
    return plots.text_by_margin(tokens, margin, **{"support": [], "label": "sigma_min"} | options)
