// Field settings that Grafana's front end registers: those of every panel, and a panel's own.
import {
  FieldColorModeId,
  FieldConfigProperty,
  PanelPlugin,
  dataLinksOverrideProcessor,
  displayNameOverrideProcessor,
  identityOverrideProcessor,
  numberOverrideProcessor,
  standardFieldConfigEditorRegistry,
  thresholdsOverrideProcessor,
  unitOverrideProcessor,
  valueMappingsOverrideProcessor,
} from '@grafana/data';

const STANDARD: Record<string, any> = {
  displayName: displayNameOverrideProcessor,
  unit: unitOverrideProcessor,
  min: numberOverrideProcessor,
  max: numberOverrideProcessor,
  decimals: numberOverrideProcessor,
  noValue: identityOverrideProcessor,
  color: identityOverrideProcessor,
  thresholds: thresholdsOverrideProcessor,
  mappings: valueMappingsOverrideProcessor,
  links: dataLinksOverrideProcessor,
  filterable: identityOverrideProcessor,
};

const setting = (id: string, process: any, defaultValue?: unknown): any => ({
  id,
  path: id,
  name: id,
  process,
  defaultValue,
  shouldApply: () => true,
  editor: () => null,
  override: () => null,
});

export function register(): void {
  standardFieldConfigEditorRegistry.setInit(() =>
    Object.entries(STANDARD).map(([id, process]) => setting(id, process))
  );
}

export function withFields(
  plugin: PanelPlugin<any, any>,
  color: FieldColorModeId,
  custom: Record<string, unknown> = {}
): PanelPlugin<any, any> {
  return plugin.useFieldConfig({
    standardOptions: { [FieldConfigProperty.Color]: { defaultValue: { mode: color } } } as any,
    useCustomConfig: (builder) => {
      for (const [id, value] of Object.entries(custom)) {
        builder.addCustomEditor(setting(id, identityOverrideProcessor, value));
      }
    },
  });
}
