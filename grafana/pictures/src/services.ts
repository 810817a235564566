// What Grafana's front end gives its libraries, as far as dashboards are drawn with it.
import { EventBusSrv, standardTransformers, standardTransformersRegistry, LoadingState } from '@grafana/data';
import { initPluginTranslations } from '@grafana/i18n';
import {
  setAppEvents,
  setDataSourceSrv,
  setPluginImportUtils,
  setRunRequest,
  setTemplateSrv,
} from '@grafana/runtime';
import { sceneUtils } from '@grafana/scenes';
import { catchError, from, map, of } from 'rxjs';
import { Prometheus } from './prometheus';

export async function start(url: string): Promise<void> {
  await initPluginTranslations('grafana');
  const source = new Prometheus(url);
  sceneUtils.registerRuntimeDataSource({ dataSource: source });
  const listed = { ...source.instanceSettings, uid: source.uid, name: 'Prometheus', type: 'prometheus' };
  setDataSourceSrv({
    get: async () => source,
    getList: () => [listed],
    getInstanceSettings: () => listed,
    reload: () => {},
    registerRuntimeDataSource: () => {},
  } as any);
  setRunRequest((asked, request) =>
    from(Promise.resolve(asked.query(request) as any)).pipe(
      map((answer: any) => ({
        state: LoadingState.Done,
        series: answer.data,
        timeRange: request.range,
        request,
      })),
      catchError((error) =>
        of({
          state: LoadingState.Error,
          series: [],
          timeRange: request.range,
          request,
          errors: [{ message: error.message }],
        })
      )
    )
  );
  setAppEvents(new EventBusSrv());
  setTemplateSrv({ getVariables: () => [], replace: (text: string) => text } as any);
  // Panels are registered at the start, see panels.tsx.
  setPluginImportUtils({ getPanelPluginFromCache: () => undefined } as any);
  // Some stand there under two names.
  const transformers = new Map(Object.values(standardTransformers).map((one: any) => [one.id, one]));
  standardTransformersRegistry.setInit(() =>
    [...transformers.values()].map((one) => ({
      id: one.id,
      name: one.name,
      transformation: async () => one,
      editor: () => null,
    })) as any
  );
}
