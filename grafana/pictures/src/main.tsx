// The page that is photographed: one dashboard, what it is drawn by, and from what.
import 'react-grid-layout/css/styles.css';
import React from 'react';
import { createRoot } from 'react-dom/client';
import { MemoryRouter } from 'react-router-dom';
import { ThemeContext, createTheme } from '@grafana/data';
import { config } from '@grafana/runtime';
import { SceneQueryRunner, sceneGraph, sceneUtils } from '@grafana/scenes';
import { GlobalStyles, LinkButton, PortalContainer } from '@grafana/ui';
import { register } from './fields';
import { PANELS } from './panels';
import { scene } from './scene';
import { start } from './services';

interface Asked {
  dashboard: any;
  prometheus: string;
  from: string;
  to: string;
  chosen: Record<string, string>;
  caption: string;
}

async function draw({ dashboard, prometheus, from, to, chosen, caption }: Asked): Promise<void> {
  const theme = createTheme({ colors: { mode: 'dark' } });
  (config as any).theme2 = theme;
  await start(prometheus);
  register();
  for (const [pluginId, plugin] of Object.entries(PANELS)) {
    sceneUtils.registerRuntimePanelPlugin({ pluginId, plugin });
  }
  const drawn = scene(dashboard, from, to, chosen);
  createRoot(document.getElementById('root')!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <MemoryRouter>
        <div style={{ padding: 16 }}>
          <div style={{ display: 'flex', gap: 8, alignItems: 'center', marginBottom: 8 }}>
            <h3 style={{ margin: 0, flexGrow: 1 }}>{dashboard.title}</h3>
            {(dashboard.links ?? []).map((link: any) => (
              <LinkButton key={link.title} variant="secondary" size="sm" icon="apps">
                {link.title}
              </LinkButton>
            ))}
          </div>
          <div style={{ color: theme.colors.text.secondary, margin: '0 0 8px' }}>{caption}</div>
          <drawn.Component model={drawn} />
        </div>
      </MemoryRouter>
      <PortalContainer />
    </ThemeContext.Provider>
  );

  (window as any).isDrawn = () => asked(drawn).every((query) => query.state.data?.state === 'Done');
  (window as any).faults = () =>
    asked(drawn).flatMap((query) => (query.state.data?.errors ?? []).map((error) => error.message));
}

const asked = (drawn: any) =>
  sceneGraph.findAllObjects(drawn, (one) => one instanceof SceneQueryRunner) as SceneQueryRunner[];

(window as any).draw = draw;
