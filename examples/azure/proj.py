"""A small app whose results go to Azure Blob Storage.

``AZURE_RESULT_BACKEND`` says where, as an ``azureblockblob://`` URL. Messages go through files in the folder that
``BROKER_FOLDER`` names, unless ``CELERY_BROKER_URL`` names a broker.
"""
import os
import time
from pathlib import Path

from celery import Celery

app = Celery('proj', broker=os.environ.get('CELERY_BROKER_URL', 'filesystem://'),
             backend=os.environ['AZURE_RESULT_BACKEND'])
app.conf.result_extended = True  # a result tells which task it is from

if app.conf.broker_url == 'filesystem://':
    folder = Path(os.environ.get('BROKER_FOLDER', 'broker')).resolve()
    messages, control = folder / 'messages', folder / 'control'
    messages.mkdir(parents=True, exist_ok=True)
    control.mkdir(exist_ok=True)
    app.conf.broker_transport = os.environ.get('BROKER_TRANSPORT')
    app.conf.broker_transport_options = {
        'data_folder_in': str(messages),
        'data_folder_out': str(messages),
        'control_folder': str(control),
        'polling_interval': 0.1,  # seconds
    }


@app.task
def add(x, y):
    return x + y


@app.task
def tsum(numbers):
    return sum(numbers)


@app.task
def fail(message):
    raise ValueError(message)


@app.task
def slow(seconds):
    time.sleep(seconds)
    return seconds
