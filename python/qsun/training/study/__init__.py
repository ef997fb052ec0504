"""The accuracy study: what SUN and QSUN cost against full fine-tuning, on three families of tasks.

python -m qsun.training.study prepare ...    data and weights into one folder (needs no GPU)
python -m qsun.training.study run ...        train and answer, in pieces (needs nothing but the folder)
python -m qsun.training.study collect ...    judge, compare, write accuracy.json (needs no GPU)
"""
