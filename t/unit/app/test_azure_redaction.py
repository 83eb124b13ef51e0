"""What ``celery report`` and ``app.conf.humanize()`` show of the URL of an Azure result backend."""
import pytest

from celery.app import utils

SECRET = 'c2VjcmV0K29mK3RoZSthY2NvdW50Kw=='
ACCOUNT_URL = 'https://someaccount.blob.core.windows.net'

URLS_WITH_A_SECRET = [
    f'azureblockblob://someaccount:{SECRET}@{ACCOUNT_URL}',
    f'azureblockblob://someaccount:{SECRET}@someaccount?container_name=results',
    f'azureblockblob://someaccount:{SECRET}@http://127.0.0.1:10000/someaccount',
    f'azureblockblob+https://someaccount:{SECRET}@someaccount.blob.core.windows.net',
    f'azureblockblob://DefaultEndpointsProtocol=https;AccountName=someaccount;AccountKey={SECRET}',
    f'azureblockblob://AccountName=someaccount;accountkey={SECRET};BlobEndpoint=http://127.0.0.1:10000/someaccount',
    f'azureblockblob://BlobEndpoint={ACCOUNT_URL};SharedAccessSignature=sv=2024-11-04&ss=b&sig={SECRET}',
    f'azureblockblob://BlobEndpoint={ACCOUNT_URL}/?sv=2024-11-04&sig={SECRET};AccountName=someaccount',
    f'celery.backends.azureblockblob.AzureBlockBlobBackend+https://someaccount:{SECRET}@someaccount',
]

URLS_WITHOUT_A_SECRET = [
    f'azureblockblob://DefaultAzureCredential@{ACCOUNT_URL}',
    f'azureblockblob://ManagedIdentityCredential@{ACCOUNT_URL}?client_id=11111111-2222-3333-4444-555555555555',
    f'azureblockblob://{ACCOUNT_URL}',
]


def humanize(app):
    return app.conf.humanize()


def report(app):
    return utils.bugreport(app)


@pytest.mark.parametrize('show', [humanize, report])
class test_the_result_backend_in_what_celery_shows:

    @pytest.mark.parametrize('url', URLS_WITH_A_SECRET)
    def test_hides_the_secret_and_names_the_account(self, celery_app, show, url):
        celery_app.conf.result_backend = url
        shown = show(celery_app)
        assert SECRET not in shown
        assert 'someaccount' in shown

    @pytest.mark.parametrize('url', URLS_WITH_A_SECRET)
    def test_hides_the_secret_under_the_old_name_of_the_setting(self, celery_app, show, url):
        celery_app.conf.CELERY_RESULT_BACKEND = url
        assert SECRET not in show(celery_app)

    @pytest.mark.parametrize('url', URLS_WITHOUT_A_SECRET)
    def test_is_whole_when_there_is_no_secret(self, celery_app, show, url):
        celery_app.conf.result_backend = url
        assert url in show(celery_app)

    def test_hides_the_password_of_another_backend(self, celery_app, show):
        celery_app.conf.result_backend = f'redis://user:{SECRET}@localhost:6379/0'
        shown = show(celery_app)
        assert SECRET not in shown
        assert 'localhost:6379' in shown
